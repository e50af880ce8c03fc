from __future__ import annotations

from pathlib import Path

import pytest

from safeopt.training import TrainConfig, from_mapping, parse_args


def parse(*argv: str) -> TrainConfig:
    return parse_args(argv, "test")


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output_dir: out\nlearning_rate: 1e-4\nseed: 7\noptimizer: safe_sgd\nguard: {budget: 0.1}\n"
    )
    config = parse("--config", str(file), "--seed", "9", "--guard.refresh_every=3", "--use_peft")
    assert (config.learning_rate, config.seed, config.use_peft) == (1e-4, 9, True)
    assert config.guard == {"budget": 0.1, "refresh_every": 3}
    assert config.max_length == TrainConfig(output_dir="x").max_length


def test_words_that_yaml_takes_for_booleans(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nmixed_precision: no\nmonitor: off\n")
    config = parse("--config", str(file))
    assert (config.mixed_precision, config.monitor) == ("no", "off")
    file.write_text("output_dir: out\ndtype: off\n")
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        parse("--config", str(file))


def test_none_is_none_in_guard_options_too(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\noptimizer: safe_adamw\nguard: {step_limit: none}\n")
    config = parse("--config", str(file), "--guard.rank", "none", "--guard.refresh_within=None")
    assert config.guard == {"step_limit": None, "rank": None, "refresh_within": None}


def test_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = parse("--output_dir", "out", "--lora_target_modules", "q_proj", "v_proj")
    assert config.lora_target_modules == ("q_proj", "v_proj")
    assert from_mapping(config.to_dict()) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output_dir", "o", "--learning_rat", "1"], "learning_rate"),
        (["--output_dir", "o", "--seed", "1.5"], "seed must be a int"),
        (["--output_dir", "o", "--use_peft", "maybe"], "use_peft must be a bool"),
        (["--output_dir", "o", "--optimizer", "lion"], "adamw, safe_adamw"),
        (["--output_dir", "o", "--max_length", "0"], "max_length must be at least 1"),
        (["--output_dir", "o", "--guard.budget"], "needs a value"),
        (["--output_dir", "o", "--gaurd.budget", "1"], "unknown option '--gaurd.budget'"),
        (["--seed", "1"], "output_dir"),
    ],
)
def test_bad_flags_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def test_unknown_yaml_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\nmax_step: 3\n")
    with pytest.raises(ValueError, match=r"run\.yaml: unknown option 'max_step'.*'max_steps'"):
        parse("--config", str(file))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n"])
def test_yaml_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        parse("--config", str(file))
