"""Reading configurations: order of sources, strictness, and errors that show where to look."""

from pathlib import Path

import pytest

from halfbyte.errors import ConfigError, MissingFileError
from halfbyte.training.config import Config
from halfbyte.training.config_file import OTHER_NAMES, load_config, write_config

MINIMAL = "model: m\ndata:\n  train: d.jsonl\noutput:\n  dir: out\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_fill_what_is_not_said(file: Path) -> None:
    config = load_config(file)
    assert config.training.method == "qlora"
    assert config.lora.rank == 16


def test_later_sources_win(file: Path) -> None:
    file.write_text(MINIMAL + "lora:\n  rank: 4\n  alpha: 4\n  dropout: 0.1\n")
    config = load_config(file, ["lora.rank=8", "lora.alpha=8"], {"lora.rank": 32, "model": None})
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (32, 8, 0.1)
    assert config.model == "m"


def test_everything_can_come_from_flags() -> None:
    config = load_config(flags={"model": "m", "data.train": "d", "output.dir": "o"})
    assert config.output.dir == "o"


@pytest.mark.parametrize("text", ["1e-4", "0.0001", "1.0e-4"])
def test_exponents_are_numbers(file: Path, text: str) -> None:
    assert load_config(file, [f"training.learning_rate={text}"]).training.learning_rate == 1e-4
    file.write_text(MINIMAL + f"training:\n  learning_rate: {text}\n")
    assert load_config(file).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("600MB", 600_000_000), ("1.5GiB", 1610612736), ("2 gb", 2 * 10**9), ("4096", 4096)],
)
def test_sizes_have_units(file: Path, text: str, expected: int) -> None:
    config = load_config(file, ["optimizer.name=paged_adamw", f"optimizer.fast_bytes={text}"])
    assert config.optimizer.fast_bytes == expected


def test_a_written_config_reads_back(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file,
        [
            "optimizer.name=paged_adamw",
            "optimizer.fast_bytes=1GB",
            "lora.targets=[q_proj]",
            "data.eval=e",
        ],
    )
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_all_faults_at_once_with_their_places(file: Path) -> None:
    file.write_text(MINIMAL + "training:\n  lerning_rate: 1\n  scheduler: cosin\nlora_r: 8\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["training.sede=3"])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    lerning = f"{file}:7: unknown key training.lerning_rate: did you mean training.learning_rate?"
    assert lerning in text
    assert f"{file}:8: training.scheduler" in text
    assert f"{file}:9: unknown key lora_r: here it is called lora.rank" in text
    assert "argument 'training.sede=3': unknown key" in text
    assert "did you mean training.seed?" in text


def test_required_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="data is required") as caught:
        load_config()
    assert "model is required" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "a mapping of settings"),
        (MINIMAL + "model: n\n", "model is given twice"),
        (MINIMAL + "lora: 3\n", ":6: lora"),
        (MINIMAL + "optimizer:\n  betas: [0.9, 1.5]\n", ":7: optimizer.betas"),
        (MINIMAL + "optimizer:\n  fast_bytes: lots\n", ":7: optimizer.fast_bytes"),
    ],
)
def test_broken_files(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


@pytest.mark.parametrize("assignment", ["lora.rank", "=3", "lora.rank=[1"])
def test_broken_assignments(file: Path, assignment: str) -> None:
    with pytest.raises(ConfigError):
        load_config(file, [assignment])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")


def test_an_empty_file_is_no_settings(file: Path) -> None:
    file.write_text("")
    with pytest.raises(ConfigError, match="model is required"):
        load_config(file)


@pytest.mark.parametrize("name", sorted(set(OTHER_NAMES.values())))
def test_names_that_others_use_lead_to_real_settings(name: str) -> None:
    model: type = Config
    for key in name.split("."):
        assert key in model.model_fields
        model = model.model_fields[key].annotation
