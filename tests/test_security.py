"""What must not be in the code, and secrets that must not reach any file."""

import ast
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from train.test_run import run_file

from megadpo.cli import main

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("megadpo", "kernels", "tools") for path in (ROOT / folder).rglob("*.py")]


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), node))
    return found


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg or "**": ast.unparse(keyword.value) for keyword in call.keywords}


def wrongs(source: str) -> list[str]:
    """Unsafe calls: what ruff's S rules look for, and what they leave to the reader."""
    found = []
    for name, call in calls(ast.parse(source)):
        given = keywords(call)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "eval", "exec", "os.system"):
            found.append(f"line {call.lineno}: {name}")
        loader = given.get("Loader", "Safe" if "safe" in name or "_Loader" in ast.unparse(call) else "")
        if name.startswith("yaml.") and name.endswith(("load", "load_all")) and "Safe" not in loader:
            found.append(f"line {call.lineno}: {name}")
        if given.get("shell") == "True":
            found.append(f"line {call.lineno}: shell=True")
        if name.endswith("from_pretrained") and given.get("trust_remote_code") not in (None, "False"):
            found.append(f"line {call.lineno}: trust_remote_code")
        if any('"0.0.0.0"' in ast.unparse(argument).replace("'", '"') for argument in call.args):
            found.append(f"line {call.lineno}: binds to every interface")
        if name.endswith("extractall") and given.get("filter") not in ("'data'", '"data"'):
            found.append(f"line {call.lineno}: extractall without filter='data'")
    return found


ALLOWED = {"tools/mutants.py": ["exec"]}
"""It runs our own source with a mistake put in; never what someone gives it."""


def test_no_unsafe_call(record_property: Callable[[str, object], None]) -> None:
    found = {}
    for path in SOURCES:
        name, lines = str(path.relative_to(ROOT)), wrongs(path.read_text())
        if [line.partition(": ")[2] for line in lines] != ALLOWED.get(name, []):
            found[name] = lines
    assert not found
    record_property("sources", len(SOURCES))


def test_the_check_itself() -> None:
    """It finds each of what it is for."""
    for line in (
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "pickle.loads(b)",
        "eval(x)",
        "yaml.load(x, Loader=yaml.Loader)",
        "subprocess.run(x, shell=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)",
        's.bind(("0.0.0.0", 1))',
        "archive.extractall(p)",
    ):
        assert len(wrongs(line)) == 1, line


def test_wall_clock_is_used_for_nothing_that_counts() -> None:
    """A clock that jumps cannot stop or fool a run: durations come from the monotonic clock."""
    # both compare with files' times, which are the wall clock's, and only for what is shown
    allowed = {"megadpo/launch/join.py", "megadpo/launch/status.py"}
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "megadpo").rglob("*.py")
        if re.search(r"\btime\.time\(|datetime\.now|\btime\.ctime\(", path.read_text())
    }
    assert users <= allowed


CANARIES = {
    "HF_TOKEN": "hf_canaryCANARYcanaryCANARYcanary01",
    "WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef02",
    "OPENAI_API_KEY": "sk-canaryCANARYcanaryCANARYcanary03",
    "AWS_SECRET_ACCESS_KEY": "canaryCANARYcanaryCANARYcanaryCANARY04",
    "MY_PASSWORD": "canary-password-05",
}


def test_no_secret_reaches_any_file(
    tmp_path: Path,
    shared: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """Keys in the environment; a run that trains, one that crashes, one that is refused: no file, no line has them."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    path = run_file(
        tmp_path,
        shared,
        train={"max_steps": 2, "save_steps": 1},
        parallel={"tensor_model_parallel_size": 1},
        export={"enabled": True},
        log={"tensorboard": True},
    )
    assert main(["train", str(path)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("megadpo.train.loop.train_step", lambda *arguments: 1 / 0)
        assert main(["train", str(path), "train.max_steps=4"]) == 1
    settings = yaml.safe_load(path.read_text())
    settings["log"]["run_name"] = CANARIES["HF_TOKEN"]
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(settings))
    assert main(["train", str(tmp_path / "second.yaml")]) == 2
    output = capfd.readouterr()
    assert "looks like a key" in output.err
    (tmp_path / "second.yaml").unlink()
    everything = [(str(file), file.read_bytes()) for file in tmp_path.rglob("*") if file.is_file()]
    assert len(everything) > 10
    record_property("searched", len(everything))
    everything += [("terminal", (output.out + output.err).encode())]
    for where, data in everything:
        for name, value in CANARIES.items():
            assert value.encode() not in data, f"{name} is in {where}"
    assert all(os.environ[name] == value for name, value in CANARIES.items())
