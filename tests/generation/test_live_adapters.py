"""Adapters switched and mixed at run time, with PEFT's composed adapters as the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.errors import UsageError
from halfbyte.generation.adapters import AdapterChoice, mix_of
from halfbyte.generation.model import Model
from halfbyte.layers.segments import pack
from tiny_models import make_oracle, save_directory
from tiny_tokenizers import byte_level

# name -> rank, alpha, rsLoRA, targets
ADAPTERS: dict[str, tuple[int, float, bool, tuple[str, ...]]] = {
    "sql": (4, 8.0, False, ("q_proj", "v_proj", "down_proj")),
    "tone": (7, 3.0, True, ("q_proj", "gate_proj", "o_proj")),
    "brief": (1, 2.0, False, ("up_proj",)),
}
PROMPTS = ["the cat", "you are", "12 345 h", "on the mat", "a"]
CHOICES: list[AdapterChoice] = [
    "sql",
    {"sql": 0.7, "tone": 0.3},
    None,
    {"brief": -0.5, "tone": 1.5},
    "tone",
]


@pytest.fixture(scope="module")
def oracle() -> Any:
    return make_oracle("llama", vocab_size=byte_level().get_vocab_size())


@pytest.fixture(scope="module")
def directory(oracle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_directory(oracle, path)
    byte_level().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return path


@pytest.fixture(scope="module")
def paths(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    linears = hb.load(directory).decoder.linears
    generator = torch.Generator().manual_seed(1)
    for name, (rank, alpha, use_rslora, targets) in ADAPTERS.items():
        modules = {
            path: LoraUpdate(
                0.2 * torch.randn(rank, linear.in_features, generator=generator),
                0.2 * torch.randn(linear.out_features, rank, generator=generator),
                alpha,
                use_rslora,
            )
            for path, linear in linears.items()
            if path.endswith(targets)
        }
        write_adapter(Adapter(modules, str(directory)), folder / name)
    return {name: folder / name for name in ADAPTERS}


@pytest.fixture
def model(directory: Path, paths: dict[str, Path]) -> Model:
    return hb.load(directory, adapters=paths, compute_dtype=torch.float32)


IDS = [3, 9, 27, 81, 243, 5, 17, 200]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's use
def test_a_live_mix_equals_the_adapter_that_peft_composes(
    directory: Path, paths: dict[str, Path], model: Model, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory)
    theirs = peft.PeftModel.from_pretrained(base, paths["sql"], adapter_name="sql")
    theirs.load_adapter(paths["tone"], adapter_name="tone")
    theirs.add_weighted_adapter(["sql", "tone"], [0.7, 0.3], "mix", combination_type="cat")
    theirs.set_adapter("mix")
    theirs.save_pretrained(tmp_path, selected_adapters=["mix"])
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0]

    model.use({"sql": 0.7, "tone": 0.3})
    live = model.logits(IDS)
    composed = hb.load(directory, adapters=[tmp_path / "mix"], compute_dtype=torch.float32)
    # float32 sums of at most 100 products in other orders: 2^-24 sqrt(100) a layer, four layers.
    torch.testing.assert_close(live, composed.logits(IDS), rtol=0, atol=1e-5)
    torch.testing.assert_close(live, expected, rtol=0, atol=1e-5)
    model.use(None)
    assert (model.logits(IDS) - live).abs().max() > 0.1


def test_weights_scale_each_update(model: Model) -> None:
    alone = {}
    for choice in (None, "sql", {"sql": 1.0}, {"sql": 0.0}, {"sql": 1, "tone": 0}):
        model.use(choice)
        alone[str(choice)] = model.logits(IDS)
    assert torch.equal(alone["None"], alone["{'sql': 0.0}"])
    for same in ("{'sql': 1.0}", "{'sql': 1, 'tone': 0}"):
        assert torch.equal(alone["sql"], alone[same])
    assert not torch.equal(alone["sql"], alone["None"])


def test_five_adapters_in_one_batch_equal_five_runs(model: Model) -> None:
    together = model.generate(PROMPTS, adapters=CHOICES, max_new_tokens=10, stop_at_eos=False)
    alone = []
    for prompt, choice in zip(PROMPTS, CHOICES, strict=True):
        model.use(choice)
        alone.append(model.generate(prompt, max_new_tokens=10, stop_at_eos=False))
    assert together == alone
    assert (
        len({model.generate("the", adapters=[choice], max_new_tokens=9) for choice in CHOICES}) == 5
    )


def test_five_adapters_in_one_forward_give_the_logits_of_five(model: Model) -> None:
    mixes = [mix_of(choice, model.adapters) for choice in CHOICES]
    documents = [torch.tensor(IDS[: 2 + index]) for index in range(5)]
    segments = pack([len(document) for document in documents], adapters=(0, 1, 2, 3, 4))
    with torch.no_grad():
        features = model.decoder(torch.cat(documents), segments, mixes=mixes)
        together = model.decoder.head.logits(features).split([len(d) for d in documents])
    for document, choice, logits in zip(documents, CHOICES, together, strict=True):
        model.use(choice)
        # The same products in blocks of other heights, so summed in another order.
        torch.testing.assert_close(logits, model.logits(document.tolist()), rtol=0, atol=1e-5)


def test_text_that_is_being_generated_goes_on_as_it_began(model: Model) -> None:
    model.use("sql")
    whole = model.generate("the cat", max_new_tokens=10, stop_at_eos=False)
    pieces = model.stream(["the cat"], max_new_tokens=10, stop_at_eos=False)
    text = next(pieces).text
    model.use("tone")
    assert text + "".join(piece.text for piece in pieces) == whole
    assert model.generate("the cat", max_new_tokens=10, stop_at_eos=False) != whole


def test_adapters_are_used_together_until_chosen(
    directory: Path, paths: dict[str, Path], model: Model
) -> None:
    found = model.logits(IDS)
    model.use(dict.fromkeys(ADAPTERS, 1.0))
    assert torch.equal(found, model.logits(IDS))
    listed = hb.load(directory, adapters=list(paths.values()), compute_dtype=torch.float32)
    assert listed.adapters == tuple(str(path) for path in paths.values())
    assert torch.equal(found, listed.logits(IDS))
    listed.use(str(paths["sql"]))
    model.use("sql")
    assert torch.equal(listed.logits(IDS), model.logits(IDS))


def test_choices_that_mean_nothing_are_listed(model: Model) -> None:
    with pytest.raises(UsageError, match="3 problems") as caught:
        model.use({"sq": 1.0, "tone": float("nan"), "brief": "much"})  # type: ignore[dict-item]
    for part in ("'sq': no adapter of this name", "sql, tone, brief", "'tone': a finite", "'much'"):
        assert part in str(caught.value)
    with pytest.raises(UsageError, match="a list of 2, one a prompt, expected, found 1"):
        model.generate(["a", "b"], adapters=["sql"])
    with pytest.raises(UsageError, match="a list of 1, one a prompt, expected, found 'sql'"):
        model.generate("a", adapters="sql")
    with pytest.raises(UsageError, match="no adapter of this name"):
        model.generate("a", adapters=["none"])


def test_names_are_needed_once(directory: Path, paths: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="each once"):
        hb.load(directory, adapters=[paths["sql"], str(paths["sql"])])
    with pytest.raises(UsageError, match="with a name"):
        hb.load(directory, adapters={"": paths["sql"]})
