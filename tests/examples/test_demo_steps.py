"""The demo's steps: what is finished is skipped, what was interrupted resumes, what has changed runs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run as demo_run
from steps import Journal, Runner, Step, lock

from megatron_vlm.config import parse_command_line

DEMO = Path(__file__).parents[2] / "examples" / "instellavl" / "demo"


def appending(folder: Path, name: str, *, reads: Path | None = None, ends: str = "") -> Step:
    """A step that adds a line to its output, so that the lines count how often it ran since it was removed."""
    output = folder / name
    code = f"open({str(output)!r}, 'a').write('ran\\n'); {ends}"
    return Step(name, f"the step {name}", [["-c", code]], [reads] if reads else [], [output], weight=1.0)


def runs(folder: Path, *names: str) -> list[int]:
    return [len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0 for name in names]


def run(folder: Path, *steps: Step) -> bool:
    runner = Runner(folder, folder / "output", list(steps))
    try:
        return runner.run()
    finally:
        runner.lock.close()


def test_finished_steps_are_skipped(tmp_path: Path) -> None:
    steps = [appending(tmp_path, name) for name in ("a", "b")]
    assert run(tmp_path, *steps)
    assert not run(tmp_path, *steps)
    assert runs(tmp_path, "a", "b") == [1, 1]


@pytest.mark.parametrize("is_training", [True, False])
def test_after_a_failure_training_resumes_and_another_step_starts_again(tmp_path: Path, is_training: bool) -> None:
    """The file that the step needs is not there at first."""
    gate = tmp_path / "gate"
    steps = [
        appending(tmp_path, "a"),
        appending(tmp_path, "b", ends=f"open({str(gate)!r})"),
        appending(tmp_path, "c"),
    ]
    steps[1].checkpoints = tmp_path / "checkpoints" if is_training else None
    with pytest.raises(SystemExit, match="step 2 failed, see above"):
        run(tmp_path, *steps)
    assert runs(tmp_path, "a", "b", "c") == [1, 1, 0]
    gate.touch()
    assert run(tmp_path, *steps)
    assert runs(tmp_path, "a", "b", "c") == [1, 2 if is_training else 1, 1]


def test_a_changed_input_runs_its_step_and_all_later_ones_from_the_beginning(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.write_text("lr: 1")
    steps = [appending(tmp_path, "a"), appending(tmp_path, "b", reads=recipe), appending(tmp_path, "c")]
    run(tmp_path, *steps)
    recipe.write_text("lr: 2")
    assert run(tmp_path, *steps)
    assert runs(tmp_path, "a", "b", "c") == [1, 1, 1]
    assert [record["finished"] for record in Journal.open(tmp_path / "output" / "steps.json").records.values()] == [
        True
    ] * 3
    (tmp_path / "b").unlink()  # as if a user had removed it
    assert run(tmp_path, *steps) and runs(tmp_path, "b", "c") == [1, 1]


def test_interrupted_training_with_changed_inputs_starts_from_the_beginning(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    recipe.write_text("lr: 1")
    step = appending(tmp_path, "a", reads=recipe)
    step.checkpoints = tmp_path / "a"
    journal = Journal.open(tmp_path / "steps.json")
    assert not journal.start(step, step.key(""))
    (tmp_path / "a").write_text("half\n")
    assert Journal.open(tmp_path / "steps.json").start(step, step.key(""))
    assert (tmp_path / "a").exists()
    recipe.write_text("lr: 2")
    assert not journal.start(step, step.key(""))
    assert not (tmp_path / "a").exists()


def test_a_training_step_resumes_at_its_newest_checkpoint(tmp_path: Path) -> None:
    step = Step("train", "", [], [], [], 1.0, checkpoints=tmp_path, iterations=400)
    assert step.share_done() == 0
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    assert step.share_done() == 0.25


def test_two_demos_do_not_share_a_folder(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(SystemExit, match="another one, or a command of one that was killed"):
        lock(tmp_path)
    held.close()
    lock(tmp_path).close()


def test_a_killed_demo_holds_its_folder_until_its_command_has_ended(tmp_path: Path) -> None:
    """And runs the interrupted step again."""
    script = (
        f"import sys; sys.path.append({str(DEMO)!r}); from pathlib import Path; from steps import Runner, Step; "
        f"folder = Path({str(tmp_path)!r}); code = 'import time; print(1, flush=True); time.sleep(1.5)'; "
        "Runner(folder, folder / 'output', [Step('a', 'a', [['-c', code]], [], [], 1.0)]).run()"
    )
    demo = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    while demo.stdout.readline() != "1\n":
        pass
    os.kill(demo.pid, signal.SIGKILL)
    demo.wait()
    with pytest.raises(SystemExit):
        lock(tmp_path / "output")
    deadline = time.monotonic() + 30
    while True:
        try:
            lock(tmp_path / "output").close()
            break
        except SystemExit:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    step = Step("a", "a", [["-c", "print(2)"]], [], [], 1.0)
    assert run(tmp_path, step)


def test_the_steps_of_the_demo(tmp_path: Path) -> None:
    """Each reads files that exist, and the recipes with their flags are complete and consecutive."""
    steps = list(demo_run.steps(tmp_path / "out", seed=7))
    assert len({step.name for step in steps}) == len(steps)
    assert all(path.is_file() for step in steps for path in step.inputs)
    assert all(path.is_relative_to(tmp_path / "out") for step in steps for path in step.outputs)
    previous = None
    for step in steps:
        if step.checkpoints is None:
            continue
        (command,) = step.commands
        recipe, _ = parse_command_line(command[command.index("megatron_vlm.train") + 1 :])
        training = recipe.training
        assert (training.seed, training.save) == (7, str(step.checkpoints))
        assert training.pretrained_checkpoint == previous
        assert step.iterations == training.train_iters >= 10
        previous = training.save
    assert previous is not None


def test_another_seed_trains_again_on_the_same_shards(tmp_path: Path) -> None:
    keys = []
    for seed in (1, 2):
        key = ""
        keys.append({step.name: (key := step.key(key)) for step in demo_run.steps(tmp_path, seed)})
    same = {name for name in keys[0] if keys[0][name] == keys[1][name]}
    assert same == {"data", "tokenizer", "shards"}
