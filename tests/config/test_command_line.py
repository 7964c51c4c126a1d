"""The command line: flags, precedence, switches, lists, help and error messages."""

from __future__ import annotations

import pytest

from megatron_vlm.config import ConfigError, Recipe, parse_command_line
from megatron_vlm.config.command_line import flag
from megatron_vlm.config.recipe import iter_settings


def parse(line: str) -> Recipe:
    return parse_command_line(line.split())[0]


def problems_of(line: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    return caught.value.problems


def test_command_line_overrides_recipe_overrides_defaults(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {train_iters: 5, lr: 1e-4}\n")
    recipe, options = parse_command_line(["--config", str(path), "--train-iters", "7", "--dry-run"])
    assert (recipe.training.train_iters, recipe.training.lr, recipe.training.seed) == (7, 1e-4, 42)
    assert vars(options) == {
        "config": str(path),
        "dry_run": True,
        "given": {"training.lr", "training.train_iters"},
    }


def test_without_arguments_all_settings_are_defaults():
    recipe, options = parse_command_line([])
    assert recipe == Recipe()
    assert vars(options) == {"config": None, "dry_run": False, "given": set()}


def test_every_setting_has_a_flag_that_sets_it_and_nothing_else():
    defaults = {setting.key: setting.value for setting in iter_settings(Recipe())}
    for setting in iter_settings(Recipe()):
        if setting.hint in (bool, bool | None):
            arguments, expected = [], True
        elif setting.hint == list[list[int]]:
            arguments, expected = ["28x56", "56x28"], [[28, 56], [56, 28]]
        elif setting.hint == list[int] | None:
            arguments, expected = ["8", "2", "64"], [8, 2, 64]
        elif setting.hint in (list[str], list[str] | None):
            arguments, expected = ["one", "two"], ["one", "two"]
        elif setting.hint in (int, int | None, float, float | None):
            whole = setting.hint in (int, int | None)
            arguments, expected = ["-3" if whole else "1e-7"], -3 if whole else 1e-7
        elif setting.choices:
            arguments, expected = [setting.choices[-1]], setting.choices[-1]
            if setting.is_list:
                expected = arguments
        else:
            arguments, expected = ["text"], "text"
        recipe, _ = parse_command_line([flag(setting.key), *arguments])
        found = {other.key: other.value for other in iter_settings(recipe)}
        assert found[setting.key] == expected, setting.key
        assert {**found, setting.key: setting.value} == defaults, setting.key


def test_names_are_those_of_megatron_lm():
    assert flag("parallel.tensor_model_parallel_size") == "--tensor-model-parallel-size"
    assert flag("training.lr_warmup_fraction") == "--lr-warmup-fraction"
    assert flag("model.language.hidden_size") == "--model.language.hidden-size"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--bf16", True),
        ("--bf16 true", True),
        ("--bf16=true", True),
        ("--bf16 false", False),
        ("--no-bf16", False),
        ("--bf16 --no-bf16", False),
    ],
)
def test_switches(line, expected):
    assert parse(line).training.bf16 is expected


def test_switches_of_the_model_are_negated_after_the_dots():
    assert parse("--model.language.no-tie-word-embeddings").model.language.tie_word_embeddings is False
    assert parse("--no-use-distributed-optimizer").parallel.use_distributed_optimizer is False


def test_a_list_ends_at_the_next_flag():
    recipe = parse("--data-path a.json b.json --trainable projector vision --seed 3")
    assert recipe.data.data_path == ["a.json", "b.json"]
    assert recipe.training.trainable == ["projector", "vision"]
    assert recipe.training.seed == 3


def test_none_unsets_a_value_of_the_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {vision_lr: 1e-6, save: out}\n")
    recipe = parse(f"--config {path} --vision-lr none --save none --rampup-batch-size none")
    assert recipe.training.rampup_batch_size is None
    assert recipe.training.vision_lr is None
    assert recipe.training.save is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tensor-parallel-size 2", "Did you mean --tensor-model-parallel-size?"),
        ("--hidden-size=3", "Did you mean --model.vision.hidden-size?"),
        ("--train_iters 3", "Did you mean --train-iters?"),
        ("--model.langauge.hidden-size 3", "Did you mean --model.language.hidden-size?"),
        ("--train-iter 3", "Did you mean --train-iters?"),  # abbreviations are errors
        ("--dry_run", "Did you mean --dry-run?"),
        ("--model.language.hiden-size 3", "Did you mean --model.language.hidden-size?"),
        ("--sequence-parallel", "always on when tensor_model_parallel_size > 1"),
        ("--micro-batch-size 1", "always one packed row"),
        ("--batch-size 8", "Did you mean --global-batch-size?"),
        ("--learning-rate 1", "Did you mean --lr?"),
        ("--output-dir x", "Did you mean --save?"),
        ("--tp 2", "Did you mean --tensor-model-parallel-size?"),
        ("--qqqq 1", "--help"),
        ("recipe.yaml", "recipe.yaml: a value without a flag"),
        ("--lr", "--lr: expected one argument"),
        ("--lr fast", "--lr: expected a number, got 'fast'"),
        ("--bf16 maybe", "--bf16: expected true or false, got 'maybe'"),
        ("--lr none", "--lr: expected a number, got 'none'"),
        ("--model.image-grid-pinpoints 28x", "--model.image-grid-pinpoints: expected a list"),
        ("--model.language.vocab-size 1.5", "--model.language.vocab-size: expected an integer"),
        ("--optimizer adamw", "--optimizer: expected one of adam, sgd, got 'adamw'; the nearest is adam"),
        ("--recompute-granularity fll", "full, selective, auto or nothing (null), got 'fll'; the nearest is full"),
        (
            "--trainable vision decoder",
            "each element one of vision, projector, language, language_lora, got ['vision', 'decoder']",
        ),
    ],
)
def test_wrong_arguments(line, message):
    (problem,) = problems_of(line)
    assert message in problem


def test_all_problems_are_reported_together(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("training: {trian_iters: 5}\n")
    problems = problems_of(f"--config {path} --lr fast --tensor-size 3 --seed x")
    assert len(problems) == 4


def test_help_is_one_line_for_each_setting_under_its_section(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert all(len(line) <= 175 for line in lines)
    headings = [line.split(":")[0] for line, above in zip(lines[1:], lines, strict=False) if not above and ":" in line]
    assert headings == ["data", "training", "parallel", "model", "model.vision", "model.language"]
    for setting in iter_settings(Recipe()):
        shown = flag(setting.key)
        if setting.hint in (bool, bool | None):
            dot = max(shown.rfind("."), 1) + 1
            shown = f"{shown[:dot]}[no-]{shown[dot:]}"
        (line,) = (line for line in lines if line.startswith(f"  {shown} "))
        assert setting.help in line
    assert any(line.startswith("  --lr X ") and line.endswith("Peak learning rate. [1e-05]") for line in lines)
    assert any(line.startswith("  --[no-]bf16 ") and line.endswith("[false]") for line in lines)
    assert any(line.startswith("  --data-path TEXT ...") and line.endswith("[required]") for line in lines)
    assert "--dry-run" in text
