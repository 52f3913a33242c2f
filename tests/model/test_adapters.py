"""LoRA goes on what was asked, in every family, and learns through packed batches what it learns
alone.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import tiny_folder, tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import ModelError
from tunesmith.model.adapters import AdapterSpec, add_adapter, candidates, full_report
from tunesmith.model.lm_head import head_inputs
from tunesmith.model.load import load_causal_lm, wrap_causal_lm
from tunesmith.model.source import resolve_model
from tunesmith.objectives import head_loss, nll
from tunesmith.optim import undecayed
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

ATTENTION = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4}
DENSE = {**ATTENTION, "gate_proj": 4, "up_proj": 4, "down_proj": 4}
EXPERTS = {**ATTENTION, "gate_up_proj": 4, "down_proj": 4}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4}
KINDS = {
    "llama": ({}, DENSE),
    "gemma2": ({}, DENSE),
    "mixtral": ({}, EXPERTS),
    "gpt_oss": ({}, EXPERTS),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        EXPERTS,
    ),
    "gpt2": (GPT2, {"c_attn": 4, "c_proj": 8, "c_fc": 4}),
    # the first layer is dense; the others have shared experts (dense) and routed ones
    "deepseek_v3": (
        DEEPSEEK,
        {
            "q_a_proj": 4,
            "q_b_proj": 4,
            "kv_a_proj_with_mqa": 4,
            "kv_b_proj": 4,
            "o_proj": 4,
            "gate_proj": 4,
            "up_proj": 4,
            "down_proj": 4 + 3,
            "gate_up_proj": 3,
        },
    ),
}


def make(family: str, **options):
    return wrap_causal_lm(tiny_model(family, **options)).model


def randomise(causal_lm) -> None:
    """B starts at zero, which hides A's gradient and the adapter's effect."""
    torch.manual_seed(1)
    for name, parameter in causal_lm.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
        assert parameter.requires_grad == ("lora_" in name), name


@pytest.mark.parametrize("family", KINDS)
def test_all_linear_is_the_same_in_every_family(family: str) -> None:
    options, kinds = KINDS[family]
    causal_lm = make(family, **options)
    before = sum(p.numel() for p in causal_lm.parameters())
    report = add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8)).report
    assert report.kinds == kinds
    added = [p for n, p in causal_lm.named_parameters() if "lora_" in n]
    assert report.trained == sum(p.numel() for p in added) > 0
    assert report.total == before + report.trained
    # one pair of matrices for each thing the report names, none elsewhere
    assert len(added) == 2 * len(report.names)
    assert not any(word in name for name in report.names for word in ("router", "lm_head", "embed"))
    randomise(causal_lm)


@pytest.mark.parametrize("family", KINDS)
def test_adapter_reloads_as_it_was(family: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base", family, **KINDS[family][0])
    causal_lm = load_causal_lm(resolve_model(str(base)), dtype="float32").model
    report = add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8)).report
    randomise(causal_lm)
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        without = plain(ids).logits
        with causal_lm.generation() as model:
            trained = model(input_ids=ids).logits
            model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        assert (trained - without).norm() > 0.01 * without.norm()
        again = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(input_ids=ids).logits
        torch.testing.assert_close(again, trained)
    source = resolve_model(str(tmp_path / "adapter"))
    assert source.folder == base.resolve()
    continued = load_causal_lm(source, dtype="float32").model
    attached = add_adapter(continued, AdapterSpec(rank=4, alpha=8), asked=["rank"])
    assert attached.report == report
    with pytest.raises(ModelError, match="rank 4"):
        add_adapter(continued, AdapterSpec(rank=8, alpha=8), asked=["rank"])
    with torch.no_grad(), continued.generation() as model:
        torch.testing.assert_close(model(input_ids=ids).logits, trained)


def document(number: int, prefix, length: int) -> Document:
    ids = np.concatenate([prefix, np.random.default_rng(number).integers(3, 400, length)])
    index = np.arange(len(ids) - 4, len(ids), dtype=np.int32)
    segment = Segment(
        ids.astype(np.int32), -1, 0, index, np.ones(4, np.float32), np.zeros(4, np.int32)
    )
    return Document((segment,), Origin("made", number))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt_oss"])
def test_gradients_of_packed_batches_equal_those_of_plain_transformers(
    family: str, checkpointing: bool
) -> None:
    causal_lm = make(family)
    add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8))
    randomise(causal_lm)
    prefix = np.arange(5, 25)
    rows = [document(i, prefix, 6 + 3 * i) for i in range(4)]
    with causal_lm.generation() as model:
        for row in rows:
            ids = torch.tensor(row.segments[0].ids).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -5:-1]
            torch.nn.functional.cross_entropy(logits, ids[-4:], reduction="sum").backward()
    expected = {n: p.grad for n, p in causal_lm.named_parameters() if p.requires_grad}
    causal_lm.zero_grad(set_to_none=True)
    causal_lm.train()
    if checkpointing:
        causal_lm.base.gradient_checkpointing_enable({"use_reentrant": False})
    head = functools.partial(head_loss, objective=nll)
    for plan in plan_step(rows, micro_tokens=10**6):
        assert plan.tokens < sum(row.tokens for row in rows), "nothing is shared"
        causal_lm(collate(plan), head).loss_sum.backward()
    for name, parameter in causal_lm.named_parameters():
        if parameter.requires_grad:
            difference = (parameter.grad - expected[name]).norm()
            assert difference <= 1e-5 * expected[name].norm() + 1e-12, name


OUTER = [
    ("lora", ["lm_head"]),
    ("lora", ["embed_tokens"]),
    ("rslora", ["embed_tokens", "lm_head", "q_proj", "down_proj"]),
    ("pissa", ["lm_head", "q_proj"]),
    ("dora", ["lm_head", "q_proj"]),
    ("oft", ["lm_head", "v_proj"]),
    ("vera", ["lm_head"]),
    ("ia3", ["lm_head"]),
]


@pytest.mark.parametrize(("kind", "targets"), OUTER)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_adapted_head_or_embedding_has_the_gradients_of_plain_peft(
    family: str, kind: str, targets: list[str]
) -> None:
    causal_lm = make(family)
    spec = AdapterSpec(kind=kind, rank=4, alpha=8, targets=targets, rotation_size=4)
    if kind == "pissa" and family == "gemma2":  # it would take from the tied embedding as well
        with pytest.raises(ModelError, match="the embedding too"):
            add_adapter(causal_lm, spec)
        return
    report = add_adapter(causal_lm, spec).report
    assert set(report.kinds) == set(targets)
    torch.manual_seed(1)
    trained = {n: p for n, p in causal_lm.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.05 * torch.randn_like(parameter)
    rows = [document(i, np.arange(5, 25), 6 + 3 * i) for i in range(3)]
    loss = torch.zeros(())
    with causal_lm.generation() as model:
        for row in rows:
            ids = torch.tensor(row.segments[0].ids).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0, -5:-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[-4:], reduction="sum")
        loss.backward()
    expected = {name: parameter.grad for name, parameter in trained.items()}
    causal_lm.zero_grad(set_to_none=True)
    causal_lm.train()
    ours = torch.zeros(())
    for plan in plan_step(rows, micro_tokens=10**6):
        output = causal_lm(collate(plan), functools.partial(head_loss, objective=nll))
        output.loss_sum.backward()
        ours = ours + output.loss_sum.detach()
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-5, atol=0)
    for name, parameter in trained.items():
        assert expected[name].norm() > 0, name
        difference = (parameter.grad - expected[name]).norm()
        assert difference <= 2e-5 * expected[name].norm(), name


def test_without_its_adapter_the_head_is_the_base() -> None:
    causal_lm = make("llama")
    base = causal_lm.head.weight.detach().clone()
    add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8, targets=["lm_head"]))
    hidden = torch.randn(5, 64)
    assert head_inputs(causal_lm.head, hidden)[1].shape[1] == 64 + 4
    with causal_lm.model.disable_adapter():
        assert torch.equal(head_inputs(causal_lm.head, hidden)[1], base)


def test_small_additions_to_a_bfloat16_head_are_not_rounded_away() -> None:
    causal_lm = wrap_causal_lm(tiny_model("llama").to(torch.bfloat16)).model
    add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8, targets=["lm_head"]))
    head = causal_lm.head
    torch.manual_seed(1)
    with torch.no_grad():
        head.lora_B["default"].weight.normal_(std=1e-6)
    plain = torch.randn(5, 64, dtype=torch.bfloat16)
    hidden, weight, _ = head_inputs(head, plain)
    base = head.get_base_layer().weight.double()
    found = hidden.double() @ weight.double().T - plain.double() @ base.T
    down, up = head.lora_A["default"].weight.double(), head.lora_B["default"].weight.double()
    expected = 2 * plain.double() @ down.T @ up.T
    assert (found - expected).norm() < 0.01 * expected.norm()
    other = wrap_causal_lm(tiny_model("llama").to(torch.bfloat16)).model
    with pytest.raises(ModelError, match="rounded away"):
        add_adapter(other, AdapterSpec(kind="dora", targets=["lm_head"]))


@pytest.mark.parametrize("kind", ["ia3", "boft", "dora", "vera"])
def test_factors_that_begin_at_one_do_not_decay(kind: str) -> None:
    causal_lm = make("llama")
    add_adapter(causal_lm, AdapterSpec(kind=kind, rank=4, rotation_size=4))
    spared = undecayed(causal_lm)
    ones = {n for n, p in causal_lm.named_parameters() if p.requires_grad and (p == 1).all()}
    scales = {n for n, _ in causal_lm.named_parameters() if "magnitude" in n or "vera_" in n}
    assert ones | scales
    assert ones | scales <= spared


def test_dropout_before_the_head_is_refused() -> None:
    with pytest.raises(ModelError, match="the head"):
        add_adapter(make("llama"), AdapterSpec(targets=["lm_head"], dropout=0.1))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_patterns_give_their_maps_other_ranks_and_alphas(family: str) -> None:
    causal_lm = make(family)
    experts = {"experts.down_proj": 3} if family == "mixtral" else {"down_proj": 3}
    ranks = {r"layers\.0\.self_attn\.q_proj": 2, **experts}
    add_adapter(
        causal_lm,
        AdapterSpec(rank=4, alpha=8, rank_pattern=ranks, alpha_pattern={"v_proj": 16.0}),
    )
    found = {
        (name.replace(".parametrizations", ""), getattr(module, "parameter_name", "")): (
            module.r["default"],
            module.lora_alpha["default"],
        )
        for name, module in causal_lm.base.named_modules()
        if hasattr(module, "lora_alpha")
    }
    for (name, parameter), (rank, alpha) in found.items():
        last = parameter or name.rsplit(".", 1)[-1]
        expected = 3 if last == "down_proj" else 2 if name.endswith("0.self_attn.q_proj") else 4
        assert (rank, alpha) == (expected, 16 if last == "v_proj" else 8), (name, parameter)
    for wrong in ({"rank_pattern": {"qq_proj": 2}}, {"alpha_pattern": {"lm_head": 2.0}}):
        with pytest.raises(ModelError, match="matches none"):
            add_adapter(make(family), AdapterSpec(**wrong))


def test_loftq_needs_a_quantised_base() -> None:
    with pytest.raises(ModelError, match="not quantised"):
        add_adapter(make("llama"), AdapterSpec(kind="loftq"))


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "vera", "oft", "boft", "ia3", "hra"])
def test_kinds_on_a_bfloat16_model_begin_as_the_model(kind: str) -> None:
    ids = torch.arange(3, 40)[None]
    causal_lm = wrap_causal_lm(tiny_model("llama").to(torch.bfloat16)).model
    with torch.no_grad(), causal_lm.generation() as model:
        before = model(input_ids=ids).logits.float()
    add_adapter(causal_lm, AdapterSpec(kind=kind, rank=4, alpha=8, rotation_size=4))
    with torch.no_grad(), causal_lm.generation() as model:
        after = model(input_ids=ids).logits.float()
    assert (after - before).norm() < 0.03 * before.norm()


def test_additions_have_the_models_dtype() -> None:
    causal_lm = wrap_causal_lm(tiny_model("llama").to(torch.bfloat16)).model
    add_adapter(causal_lm, AdapterSpec())
    assert {p.dtype for p in causal_lm.parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied_and_frozen() -> None:
    causal_lm = make("llama", tie_word_embeddings=True)
    add_adapter(causal_lm, AdapterSpec(targets=["q_proj"]))
    assert causal_lm.head.weight is causal_lm.base.get_input_embeddings().weight
    assert not causal_lm.head.weight.requires_grad


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["q_proj", "v_proj"], {"q_proj": 4, "v_proj": 4}),
        (["layers.1.mlp.up_proj"], {"up_proj": 1}),
        (r".*\.layers\.[01]\.self_attn\.[qk]_proj", {"q_proj": 2, "k_proj": 2}),
    ],
)
def test_chosen_targets(targets, kinds: dict) -> None:
    assert add_adapter(make("llama"), AdapterSpec(targets=targets)).report.kinds == kinds


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], "query.*", ["layernorm"], ["_proj"], []])
def test_targets_that_match_nothing_name_the_candidates(targets) -> None:
    with pytest.raises(ModelError, match="matches nothing") as caught:
        add_adapter(make("llama"), AdapterSpec(targets=targets))
    assert "q_proj" in (caught.value.hint or "")


def test_routers_are_no_targets() -> None:
    causal_lm = make("mixtral")
    assert not any("gate" in name.split(".") for name in candidates(causal_lm).names)
    with pytest.raises(ModelError, match="matches nothing"):
        add_adapter(causal_lm, AdapterSpec(targets=["gate"]))


def test_experts_that_cannot_be_told_are_an_error() -> None:
    causal_lm = make("mixtral")
    causal_lm.config.num_local_experts = 5
    with pytest.raises(ModelError, match="weights of experts") as caught:
        add_adapter(causal_lm, AdapterSpec())
    assert "experts" in str(caught.value)
    assert add_adapter(causal_lm, AdapterSpec(targets=["q_proj"])).report.kinds == {"q_proj": 4}


def test_broken_regular_expression_is_refused() -> None:
    with pytest.raises(ModelError, match="regular expression"):
        add_adapter(make("llama"), AdapterSpec(targets="(q_proj"))


def test_dropout_before_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="dropout"):
        add_adapter(make("mixtral"), AdapterSpec(dropout=0.1))
    assert add_adapter(
        make("mixtral"), AdapterSpec(dropout=0.1, targets=["q_proj"])
    ).report.kinds == {"q_proj": 4}


def test_full_report_counts_everything() -> None:
    report = full_report(make("llama"))
    assert report.share == 1.0
    assert report.trained == sum(p.numel() for p in tiny_model("llama").parameters())
