"""Text in, text out: streaming, stop strings, batches, chat, adapters, and the commands."""

import io
import json
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters.adapter import Adapter, LoraUpdate
from halfbyte.adapters.peft_files import write_adapter
from halfbyte.cli import app
from halfbyte.errors import FormatError, UsageError
from halfbyte.generation.model import GenerateOptions, Model
from tiny_models import make_oracle, save_directory
from tiny_tokenizers import TEMPLATES, byte_level

PROMPTS = ["the cat", "you are", "12 345 h"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_level()
    save_directory(make_oracle("llama", vocab_size=tokenizer.get_vocab_size()), path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    return path


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return hb.load(directory, compute_dtype=torch.float32)


def test_only_new_text_is_returned_and_batches_equal_single_prompts(model: Model) -> None:
    together = model.generate(PROMPTS, max_new_tokens=12)
    assert together == [model.generate(prompt, max_new_tokens=12) for prompt in PROMPTS]
    ids = model.tokenizer.encode(PROMPTS[0])
    for _ in range(12):
        ids.append(int(model.logits(ids)[-1].argmax()))
    expected = model.tokenizer.decode(ids[len(model.tokenizer.encode(PROMPTS[0])) :])
    assert together[0] == expected


def test_pieces_join_to_the_text(model: Model) -> None:
    options: GenerateOptions = {"max_new_tokens": 12, "temperature": 1.0, "stop_at_eos": False}
    pieces = list(model.stream(PROMPTS, **options))
    for index, prompt in enumerate(PROMPTS):
        mine = [piece for piece in pieces if piece.sequence == index]
        whole = model.generate(prompt, **options)
        assert "".join(piece.text for piece in mine) == whole
        assert [piece.finish for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert (mine[-1].finish, mine[-1].num_tokens) == ("length", 12)


def test_a_stop_string_ends_the_text_before_it(model: Model) -> None:
    whole = model.generate(PROMPTS[0], max_new_tokens=30, stop_at_eos=False)
    stop = whole[5:8]
    last = list(model.stream(PROMPTS[:1], max_new_tokens=30, stop_at_eos=False, stop=[stop]))[-1]
    assert (
        model.generate(PROMPTS[0], max_new_tokens=30, stop_at_eos=False, stop=[stop])
        == whole[: whole.find(stop)]
    )
    assert last.finish == "stop"


def test_stop_tokens_can_be_ignored(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    free = next(iter(model.stream_ids([[5]], max_new_tokens=3, stop_at_eos=False)))
    assert free is not None
    first = int(model.logits([5])[-1].argmax())
    monkeypatch.setattr(Model, "stop_ids", frozenset({first}))
    ended = list(model.stream_ids([[5]], max_new_tokens=3))
    assert [(p.text, p.finish, p.num_tokens) for p in ended] == [("", "stop", 1)]
    kept = list(model.stream_ids([[5]], max_new_tokens=3, stop_at_eos=False))
    assert kept[-1].num_tokens == 3


def test_chat_goes_through_the_template(model: Model) -> None:
    messages = [{"role": "user", "content": "the cat"}]
    text = "".join(piece.text for piece in model.chat(messages, max_new_tokens=8))
    ids = model.tokenizer.encode_chat(messages, add_generation_prompt=True).ids
    direct = model.stream_ids([list(ids)], max_new_tokens=8)
    assert text == "".join(piece.text for piece in direct)


def make_adapter(directory: Path, target: Path, *, features: int = 48) -> Path:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, features, generator=generator)
    b = torch.randn(96, 2, generator=generator)
    write_adapter(
        Adapter({"model.layers.0.self_attn.q_proj": LoraUpdate(a, b, alpha=4.0)}, str(directory)),
        target,
    )
    return target


def test_adapters(directory: Path, tmp_path: Path) -> None:
    adapter = make_adapter(directory, tmp_path / "adapter")
    plain = hb.load(directory, compute_dtype=torch.float32)
    adapted = hb.load(directory, adapters=[adapter], compute_dtype=torch.float32)
    ids = [3, 9, 27]
    assert not torch.allclose(plain.logits(ids), adapted.logits(ids))
    adapted.decoder.mixes = ((),)
    torch.testing.assert_close(plain.logits(ids), adapted.logits(ids))
    with pytest.raises(FormatError, match="does not fit the base model"):
        hb.load(directory, adapters=[make_adapter(directory, tmp_path / "wide", features=50)])
    with pytest.raises(UsageError, match="each once"):
        hb.load(directory, adapters=[adapter, adapter])


def test_misuse_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="temperature: at least 0"):
        model.generate("the", temperature=-1.0)
    with pytest.raises(UsageError, match="a list of strings"):
        model.generate("the", stop="abc")
    with pytest.raises(UsageError, match="at least one token"):
        model.logits([])
    with pytest.raises(UsageError, match="prompt 0: 1 to 63 tokens"):
        model.generate("")


def test_generate_command(
    directory: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(directory), "--max-new-tokens", "6"]
    assert app.run([*arguments, PROMPTS[0]]) == 0
    plain = hb.load(directory).generate(PROMPTS[0], max_new_tokens=6)
    assert capsys.readouterr().out == plain + "\n"
    assert app.run([*arguments, "--json", *PROMPTS]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records[:-1]] == hb.load(directory).generate(
        PROMPTS, max_new_tokens=6
    )
    assert records[-1]["num_tokens"] == 18
    assert app.run([*arguments, ""]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_chat_command(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["chat", str(directory), "--max-new-tokens", "5"]
    assert app.run([*arguments, "--json", "--message", "the cat"]) == 0
    first = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n\nyou\n"))
    assert app.run([*arguments, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == 2
    assert records[0]["text"] == first["text"]
