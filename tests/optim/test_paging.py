"""State that rests outside of memory gives the same bits, and leaves no files."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optim_inputs import make_parameters, set_gradients

from tunesmith.errors import InputError
from tunesmith.optim import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon, Pages, paging

KINDS = [AdamW, AdamW8bit, Adafactor, Lion, Muon, SGD]
SHAPES = {"linear": (192, 128), "bias": (33,), "experts": (2, 72, 256)}


parameters = functools.partial(make_parameters, SHAPES)


def step(optimizer, named, seed: int) -> None:
    set_gradients(named, seed)
    optimizer.step(1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_paged_state_gives_the_same_bits(kind, dtype, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(paging, "SMALL", 512)
    named, plain = parameters(dtype), parameters(dtype)
    pages = Pages(tmp_path)
    ours = kind(named.items(), weight_decay=0.1, pages=pages)
    reference = kind(plain.items(), weight_decay=0.1)
    for seed in range(3):
        step(ours, named, seed)
        step(reference, plain, seed)
    state, wanted = ours.state_dict(), reference.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert ours.held_bytes + ours.paged_bytes == reference.held_bytes
    assert ours.saved_bytes == reference.saved_bytes
    assert (pages.bytes > 0) == (kind is not Adafactor)  # which keeps rows and columns alone

    again, others = Pages(tmp_path), parameters(dtype)
    restored = kind(others.items(), weight_decay=0.1, pages=again)
    restored.load_state_dict({name: tensor.clone() for name, tensor in wanted.items()})
    step(restored, others, 3)
    step(reference, plain, 3)
    assert all(torch.equal(others[name], plain[name]) for name in plain)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system doesn't list mappings")
def test_state_is_in_files_without_a_name(tmp_path: Path) -> None:
    named = parameters(torch.float32)
    optimizer = AdamW(named.items(), pages=Pages(tmp_path))
    assert list(tmp_path.iterdir()) == []
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in lines if f"{tmp_path}/.optimizer-" in line]
    assert len(mapped) == 4  # two moments of two parameters; those of the small one stay
    assert all(line.split()[1] == "rw-s" and line.endswith("(deleted)") for line in mapped)
    assert optimizer.paged_bytes == 8 * (192 * 128 + 2 * 72 * 256)
    del optimizer
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


LIMITED = """
import resource, sys, torch
from pathlib import Path
from torch import nn
from tunesmith.optim import AdamW, Pages

torch.set_num_threads(1)
weight = nn.Parameter(torch.zeros(4096, 4096))
weight.grad = torch.ones(4096, 4096)
used = next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]
limit = int(used) * 1024 + 64 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    AdamW([("weight", weight)]).step(1e-2)
except RuntimeError as error:
    assert "allocate" in str(error), error
else:
    sys.exit("128 MiB of moments fit into 64")
optimizer = AdamW([("weight", weight)], pages=Pages(Path(sys.argv[1])))
optimizer.step(1e-2)
for tensor, value in ((weight.detach(), -1e-2), (optimizer.state_dict()["exp_avg.weight"], 0.1)):
    assert abs(float(tensor.min()) - value) < 1e-6 and abs(float(tensor.max()) - value) < 1e-6
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mapped files don't count as data on Linux")
def test_moments_that_do_not_fit_into_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_step_waits_once_for_what_goes_back_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    pages, gpu = Pages(tmp_path), torch.device("cuda", 0)
    for _ in range(2):
        param = SimpleNamespace(
            parameter=SimpleNamespace(device=gpu), state={"momentum": Resting(1.0, "cpu")}
        )
        with pages.on_device(param):
            param.state["momentum"].value = 2.0
        assert param.state["momentum"].value == 2.0
        assert param.state["momentum"].device.type == "cpu"
    assert not waited
    pages.synchronize()
    pages.synchronize()
    assert waited == [gpu]


def test_a_disk_without_room_is_an_input_error(tmp_path: Path, monkeypatch) -> None:
    def full(handle: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(paging, "reserve", full)
    with pytest.raises(InputError, match="No space left") as caught:
        AdamW(parameters(torch.float32).items(), pages=Pages(tmp_path))
    assert "paged_optimizer=false" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="can't be kept"):
        AdamW(parameters(torch.float32).items(), pages=Pages(tmp_path / "nowhere"))


class Resting:
    """A tensor on a device that this machine need not have."""

    def __init__(self, value: float, device: str) -> None:
        self.value, self.device = value, torch.device(device)

    def to(self, device: torch.device, *, non_blocking: bool) -> Resting:
        return Resting(self.value, str(device))

    def copy_(self, other: Resting, *, non_blocking: bool) -> None:
        self.value = other.value


def test_elsewhere_state_comes_to_its_device_and_goes_back(tmp_path: Path) -> None:
    home = {"exp_avg": Resting(1.0, "cpu"), "small": Resting(3.0, "cuda:0")}
    param = SimpleNamespace(parameter=SimpleNamespace(device=torch.device("cuda:0")), state=home)
    with Pages(tmp_path).on_device(param):
        assert {str(t.device) for t in param.state.values()} == {"cuda:0"}
        param.state["exp_avg"].value = 2.0
    assert param.state is home
    assert (home["exp_avg"].value, str(home["exp_avg"].device)) == (2.0, "cpu")
