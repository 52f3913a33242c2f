"""Deferred initialisation on the meta device: no rank ever holds the whole model. Each rank reads
its shards from the files, and a trial model of a few layers is self-tested in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tunesmith.build.data import Data
from tunesmith.build.float8 import use_float8
from tunesmith.build.inputs import UserObjects
from tunesmith.build.model import FoundModel, free_bytes, load_model
from tunesmith.checkpoint.rng import preserved_rng
from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.document_store import highest_id
from tunesmith.data.templates.template import Template
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError
from tunesmith.model.adapters.state import AdapterState
from tunesmith.model.causal_lm import CausalLM, outside_decoder
from tunesmith.model.deferred_load import Traits, deferred_model, mismatch, trial_model
from tunesmith.model.load import LoadedModel
from tunesmith.model.ops.dtype import choose_dtype
from tunesmith.model.reached import freeze_unreached, unreached_by_text
from tunesmith.model.selftest import SelfTest, self_test
from tunesmith.model.source import ModelSource
from tunesmith.model.weight_files import WeightFiles


@dataclass(frozen=True, slots=True)
class RankModel:
    """A rank's model, and what is tested of it: itself, or on the first rank its trial."""

    loaded: LoadedModel
    trial: CausalLM | None = None


@dataclass(frozen=True, slots=True)
class TestedModel:
    """A model that passed its self-test, and what is to be said of it."""

    model: CausalLM
    tested: SelfTest
    room: int  # bytes that were free before it was loaded, the least over all ranks
    notes: Sequence[str]
    adapter: AdapterState  # of the adapter that it came with
    unread: WeightFiles | None  # where the weights are, of a model without them
    unreached: frozenset[str]  # parameters of the base that no text reaches
    frozen: Sequence[str]  # the line that says so


def load_tested(
    recipe: Recipe,
    found: FoundModel,
    objects: UserObjects,
    data: Data,
    world: World,
    device: torch.device,
) -> TestedModel:
    """Load the model and test it on this machine: its head, packing and prefix sharing.

    Raises:
        ModelError: a test failed in a way that would make the training wrong.
    """
    room = int(world.all_reduce_min(free_bytes(device, world)))
    ranked = load_for_ranks(
        recipe, found.source, objects, template=data.template, world=world, device=device
    )
    loaded = ranked.loaded
    model = loaded.model
    check_ids(data, model)
    if recipe.device.attention == "unpacked":
        model.run_unpacked()
    tested = test_loaded(ranked, world, max_length=data.longest)
    whole = loaded.unread is None
    unreached = unreached_by_text(model) if whole else outside_decoder(model)
    frozen = freeze_unreached(model, unreached)
    notes = [*loaded.notes, *tested.notes, *use_float8(recipe, model)]
    return TestedModel(model, tested, room, notes, loaded.adapter, loaded.unread, unreached, frozen)


def check_ids(data: Data, model: CausalLM) -> None:
    """Refuse ids for which the model has no embedding.

    Raises:
        ModelError: names the highest of them and a row that has it.
    """
    stated = int(getattr(model.config.get_text_config(), "vocab_size", None) or 0)
    embedding = model.base.get_input_embeddings()
    # A sharded embedding has fewer rows than the config states, a padded one has more.
    size = max(stated, int(embedding.weight.shape[0]))
    for documents in (data.prepared.documents, *(one.documents for one in data.eval_sets)):
        found = highest_id(documents)
        if found is not None and found[0] >= size:
            raise ModelError(
                f"ids without an embedding: id {found[0]}; the model has {size:,}",
                where=str(found[1]),
                hint="tokenizer and model don't belong together, or tokens were added without "
                "embeddings: model.resize_token_embeddings(len(tokenizer)) before it is saved",
            )


def load_for_ranks(
    recipe: Recipe,
    source: ModelSource | None,
    objects: UserObjects,
    *,
    template: Template,
    world: World,
    device: torch.device,
) -> RankModel:
    """The model, without its weights where it will be spread and its files can be read in parts."""
    if recipe.device.shard == "none" and world.tp.size == 1:
        return RankModel(load_model(recipe, source, objects, device, template=template))
    reason = _needs_whole(recipe, source, template)
    if reason is None and source is not None:
        with preserved_rng():
            found = _deferred(recipe, source, world, device)
        if isinstance(found, RankModel):
            return found
        reason = found
    # One that will be spread comes to a GPU a layer at a time.
    home = torch.device("cpu")
    loaded = load_model(recipe, source, objects, device, template=template, home=home)
    note = f"each rank loads the whole model before it is given out in parts: {reason}"
    return RankModel(replace(loaded, notes=[*loaded.notes, note]))


def test_loaded(ranked: RankModel, world: World, *, max_length: int) -> SelfTest:
    """The self-test of the model; of one without weights on the first rank, by its trial.

    Raises:
        ModelError: as `self_test`, on every rank.
    """
    model, trial = ranked.loaded.model, ranked.trial
    if ranked.loaded.unread is None:
        return self_test(model, max_length=max_length)
    found: SelfTest | tuple[str, str | None, str | None] | None = None
    if trial is not None:
        if model.unpacked:
            trial.run_unpacked()
        try:
            found = self_test(trial, max_length=max_length)
        except ModelError as error:
            found = (error.message, error.where, error.hint)
    found = world.broadcast_object(found)
    if isinstance(found, tuple):
        raise ModelError(found[0], where=found[1], hint=found[2])
    assert found is not None
    model.logits = found.logits
    if found.unpacked and not model.unpacked:
        model.run_unpacked()
    return found


def _needs_whole(recipe: Recipe, source: ModelSource | None, template: Template) -> str | None:
    """Why it can't be built without its weights, as far as the recipe says."""
    adapter = recipe.adapter
    if source is None:
        return "it was given in memory"
    if recipe.device.tensor_parallel > 1:
        return "what its parts compute is held to the whole"
    if recipe.model.quantization != "none":
        return "its base is quantised while it is read"
    if source.adapter_folder is not None or adapter.continue_from is not None:
        return "it goes on with an adapter"
    if template.added:
        return "the template adds rows to its embedding"
    if recipe.objective.kl and adapter.kind == "none":
        return "the objective compares with a frozen copy of it"
    return None


def _deferred(
    recipe: Recipe, source: ModelSource, world: World, device: torch.device
) -> RankModel | str:
    """The model without its weights, or why its files can't be read in parts. The first rank finds
    out, with a trial model that no other has.
    """
    chosen = choose_dtype(recipe.model.dtype, device)
    trust = recipe.model.trust_remote_code
    trial: CausalLM | None = None
    traits: Traits | str | None = None
    if world.is_main:
        try:
            trial = trial_model(source, dtype=chosen.dtype, trust_remote_code=trust)
        except ModelError as error:  # loading the whole says it on every rank
            traits = error.message
        else:
            traits = "no two of its layers are alike"
            if trial is not None:
                traits = Traits(trial.native_attention, trial.unpacked)
    traits = world.broadcast_object(traits)
    if not isinstance(traits, Traits):
        return str(traits)
    deferred = deferred_model(source, traits, dtype=chosen.dtype, trust_remote_code=trust)
    reason = world.broadcast_object(None if trial is None else mismatch(deferred, trial))
    if reason is not None:
        return reason
    layers = trial.config.get_text_config().num_hidden_layers if trial is not None else 0
    note = (
        f"each rank reads its own part of the weights; tested with the first {layers} of "
        f"{deferred.model.config.get_text_config().num_hidden_layers} layers"
    )
    return RankModel(replace(deferred, notes=[chosen.note, *deferred.notes, note]), trial)
