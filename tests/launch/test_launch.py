"""Files for clusters: they parse, hold the values of the recipe, and a name in them is a word."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run
from tunesmith.config.read import read_recipe
from tunesmith.errors import RecipeError
from tunesmith.launch.job import (
    GRACE,
    PORT,
    LaunchJob,
    job_name,
    k8s_files,
    skypilot_files,
    slurm_files,
)
from tunesmith.launch.need import devices_needed

KINDS = {"slurm": slurm_files, "k8s": k8s_files, "skypilot": skypilot_files}
JOB = LaunchJob(
    name="tunesmith-x", recipe="model: {name: m}\n", folder="/work/here", out="/shared/runs/x",
    nodes=3, per_node=4, image="registry/image:1", claim="disk", mount="/shared",
    accelerator="H100",
)  # fmt: skip
HOSTILE = "/a b/$(touch PWNED)`touch PWNED`;touch PWNED 'x' \"y\" ${HOME}\n&& touch PWNED #é"
GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("launch") / "tiny-llama")


@pytest.fixture
def words(model: Path, tmp_path: Path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(4))
    return ["launch", "--model", str(model), "--data", str(data)]


def shell_of(kind: str, files: dict[str, str]) -> str:
    return files["job.sbatch"] if kind == "slurm" else yaml.safe_load(files["job.yaml"])["run"]


def command_of(kind: str, job: LaunchJob) -> list[str]:
    """The words with which torchrun is started."""
    files = KINDS[kind](job)
    if kind == "k8s":
        objects = {one["kind"]: one for one in yaml.safe_load_all(files["job.yaml"])}
        return objects["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]
    text = shell_of(kind, files)
    at = text.index("torchrun")
    return shlex.split(text[at:].replace("\\\n", "").partition("\nrunning=")[0].rstrip(" &\n"))


@pytest.mark.parametrize("kind", ["slurm", "skypilot"])
@pytest.mark.parametrize("path", ["/shared/runs/x", HOSTILE])
def test_scripts_are_scripts(kind: str, path: str) -> None:
    files = KINDS[kind](replace(JOB, out=path, folder=path))
    done = subprocess.run(
        ["bash", "-n"], input=shell_of(kind, files), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_torchrun_starts_the_recipe_and_goes_on_with_it(kind: str) -> None:
    command = command_of(kind, JOB)
    assert command[0] == "torchrun"
    assert {"--nnodes=3", "--nproc-per-node=4", "--rdzv-backend=c10d"} <= set(command)
    endpoint = next(word for word in command if word.startswith("--rdzv-endpoint="))
    assert endpoint.endswith(f":{PORT}")
    at = command.index("-m")
    assert command[at + 1 : at + 3] == ["tunesmith", "train"]
    assert command[at + 3].endswith("recipe.yaml")
    assert command[at + 4 :] == ["--out", "/shared/runs/x", "--resume"]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_words(kind: str) -> None:
    command = command_of(kind, replace(JOB, out=HOSTILE))
    assert command[command.index("--out") + 1].replace("$$(", "$(") == HOSTILE
    assert command[-1] == "--resume"


@pytest.mark.parametrize("kind", ["slurm", "skypilot"])
def test_script_with_hostile_names_runs_torchrun_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    """The script is run, with a torchrun that writes its arguments down."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "torchrun").write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$SEEN"\nexit ${CODE:-0}\n')
    (tools / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tools / "scontrol").write_text("#!/bin/bash\necho node-1\necho node-2\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    here = tmp_path / "$(touch PWNED) 'x'"
    here.mkdir()
    text = shell_of(kind, KINDS[kind](replace(JOB, out=HOSTILE, folder=str(here))))
    seen = tmp_path / "seen"
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin", "SEEN": str(seen), "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[1-2]", "HOME": str(tmp_path),
        "SKYPILOT_NODE_IPS": "node-1\nnode-2", "SKYPILOT_TASK_ID": "7",
    }  # fmt: skip
    for code in (0, 5):
        done = subprocess.run(
            ["bash", "-c", text], env={**environment, "CODE": str(code)}, cwd=tmp_path,
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    given = seen.read_text().split("\0")
    assert f"--rdzv-endpoint=node-1:{PORT}" in given
    assert given[given.index("--out") + 1] == HOSTILE
    assert not list(tmp_path.rglob("PWNED"))


def test_slurm_hands_the_signal_on_waits_and_requeues(tmp_path: Path) -> None:
    """SIGTERM reaches the ranks, which end by themselves; then the job goes back into the queue."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "torchrun").write_text(
        "#!/bin/bash\ntrap 'sleep 0.5; echo saved >> \"$SEEN\"; exit 143' TERM\n"
        'echo started >> "$SEEN"\nfor i in $(seq 300); do sleep 0.1; done\n'
    )
    (tools / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tools / "scontrol").write_text(
        '#!/bin/bash\n[ "$1" = requeue ] && echo "$@" >> "$SEEN"\necho n\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    seen = tmp_path / "seen"
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin", "SEEN": str(seen), "SLURM_SUBMIT_DIR": "/",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n",
    }  # fmt: skip
    text = shell_of("slurm", slurm_files(replace(JOB, folder=str(tmp_path))))
    process = subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.DEVNULL)
    while not seen.exists():
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    assert seen.read_text().split("\n") == ["started", "saved", "requeue 7", ""]


def test_slurm_asks_for_what_the_job_needs() -> None:
    script = slurm_files(replace(JOB, hours=1.5))["job.sbatch"]
    for line in (
        "--nodes=3", "--gpus-per-node=4", "--ntasks-per-node=1", "--requeue", "--time=1:30:00",
        f"--signal=B:TERM@{GRACE}", "--job-name=tunesmith-x",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--time" not in slurm_files(JOB)["job.sbatch"]


def test_kubernetes_objects_fit_together() -> None:
    objects = {o["kind"]: o for o in yaml.safe_load_all(k8s_files(JOB)["job.yaml"])}
    assert list(objects) == ["ConfigMap", "Service", "Job"]
    assert yaml.safe_load(objects["ConfigMap"]["data"]["recipe.yaml"]) == {"model": {"name": "m"}}
    spec = objects["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (3, 3, "Indexed")
    pod = spec["template"]["spec"]
    assert pod["subdomain"] == objects["Service"]["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] == GRACE
    assert pod["restartPolicy"] == "OnFailure"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts["shared"] == "/shared"
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert f"--rdzv-endpoint=tunesmith-x-0.tunesmith-x:{PORT}" in container["command"]


def test_skypilot_task_names_devices_and_nodes() -> None:
    task = yaml.safe_load(skypilot_files(replace(JOB, accelerator="A100"))["job.yaml"])
    assert task["num_nodes"] == 3
    assert task["resources"] == {"accelerators": "A100:4"}
    assert list(task["file_mounts"].values()) == ["./recipe.yaml"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [{"nodes": 5}, {"per_node": 2}, {"out": "/other"}, {"folder": "/else"}, {"hours": 2.0},
     {"recipe": "model: {name: other}\n"}, {"name": "another"}],
)  # fmt: skip
def test_each_value_changes_the_files(kind: str, change: dict) -> None:
    assert KINDS[kind](replace(JOB, **change)) != KINDS[kind](JOB)


@pytest.mark.parametrize(
    "text", ["Meta/Llama-3.1 8B", "x" * 99, "7b", "--", "é", "", "a\n#SBATCH --exclusive", "$(x)"]
)
def test_names_of_jobs_are_plain(text: str) -> None:
    name = job_name(text)
    assert 0 < len(name) <= 44
    assert name[0].isalpha()
    assert name.replace("-", "").isalnum()
    assert name == name.lower().strip("-")


def test_nothing_is_written_unless_asked(words: list[str], tmp_path: Path, capsys) -> None:
    assert run([*words, "--slurm", "--nodes", "2"]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --nodes=2" in shown.out
    assert "nothing was written" in shown.err
    assert not (tmp_path / "launch").exists()
    assert run([*words, "--slurm", "--nodes", "2", "--write"]) == 0
    assert sorted(p.name for p in (tmp_path / "launch").iterdir()) == ["job.sbatch", "recipe.yaml"]
    assert capsys.readouterr().out.split() == ["launch/job.sbatch", "launch/recipe.yaml"]


def test_written_recipe_is_the_one_that_was_asked(words: list[str], tmp_path: Path) -> None:
    changed = [*words, "optim.lr=3e-5", "device.shard=full", "--skypilot", "--write"]
    assert run([*changed, "--to", str(tmp_path / "there")]) == 0
    recipe = read_recipe(tmp_path / "there" / "recipe.yaml")
    assert recipe.optim.lr == 3e-5
    assert recipe.device.shard == "full"
    assert shutil.which("bash")


def test_kubernetes_without_image_or_volume_is_refused(words: list[str], capsys) -> None:
    assert run([*words, "--k8s"]) == 2
    assert "--image and --claim" in capsys.readouterr().err
    assert run([*words, "--k8s", "--image", "a:1", "--claim", "disk"]) == 0


@pytest.mark.parametrize("flags", [[], ["--slurm", "--k8s"]])
def test_one_cluster_must_be_named(flags: list[str], words: list[str], capsys) -> None:
    assert run([*words, *flags]) == 2
    assert "--slurm, --k8s or --skypilot" in capsys.readouterr().err


def test_need_falls_with_sharding_and_grows_with_the_states(model: Path) -> None:
    def need(*changes: str, memory: float = 0.01):
        recipe = read_recipe(
            {"model": str(model), "data": "d"}, ["device.micro_tokens=8", *changes]
        )
        return devices_needed(recipe, memory=int(memory * GIB), per_node=4)

    one = need()
    assert (one.devices, one.shard) == (1, "none")
    assert one.on(8, per_node=4) == one.on(1, per_node=4) == one.states.total + one.working
    least = (one.states.total / 3 + one.working) / 0.9 / GIB
    full = need("device.shard=full", memory=least * 1.01)
    assert full.devices == 3
    assert need("device.shard=full", memory=least * 0.8).devices > 3
    assert full.on(8, per_node=4) < full.on(4, per_node=4)
    hybrid = need("device.shard=hybrid", memory=least * 1.01)
    assert hybrid.on(8, per_node=4) == hybrid.on(4, per_node=4)
    assert need("adapter=lora").states.total < one.states.total
    assert need("device.micro_tokens=16").working == 2 * one.working
    with pytest.raises(RecipeError, match="do not fit") as caught:
        need(memory=least)
    assert "device.shard=full" in str(caught.value)


def test_too_few_nodes_are_refused_with_the_number(words: list[str], capsys) -> None:
    small = ["--slurm", "--gpus-per-node", "1", "device.shard=full", "device.micro_tokens=8"]
    assert run([*words, *small, "--gpu-memory", "1", "--nodes", "1"]) == 0
    assert "1 x 1 devices" in capsys.readouterr().err


def test_devices_are_whole_groups_of_those_that_share(words: list[str], capsys) -> None:
    three = [
        "--slurm",
        "--gpus-per-node",
        "3",
        "device.context_parallel=2",
        "device.micro_tokens=8",
    ]
    assert run([*words, *three]) == 0
    assert "2 x 3 devices" in capsys.readouterr().err
    assert run([*words, *three, "--nodes", "3"]) == 2
    said = capsys.readouterr().err
    assert "3 x 3 devices can't be divided into groups of 2" in said
    assert "--nodes 4" in said


def test_model_that_is_not_here_needs_a_number(words: list[str], capsys) -> None:
    words[words.index("--model") + 1] = "/not/here"
    assert run([*words, "--slurm"]) == 2
    assert "--nodes" in capsys.readouterr().err
    assert run([*words, "--slurm", "--nodes", "4"]) == 0
    assert "can't be computed" in capsys.readouterr().err
