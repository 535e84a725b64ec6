"""``python -m exporters.evaluate``: its numbers are those of the original, computed in the most obvious way."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from exporters import ExportConfig, export
from exporters.errors import ExportError, InvalidConfig, InvalidData, InvalidVersion
from exporters.evaluate.suites import EvaluateConfig, Evaluation, evaluate
from tests.integration.exporters.conftest import CORPUS
from tests.integration.exporters.test_seq2seq import T5_SIZES

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
TEXT = "\n".join(CORPUS) + "\nGrüße, 東京 🙂\n"
BOS_ID, MAX_MODEL_LEN = 0, 48


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *content: Any) -> Path:
        path = tmp_path / name
        lines = [text if isinstance(text, str) else json.dumps(text) + "\n" for text in content]
        path.write_text("".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def seq2seq(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, version without a certificate) of a T5. Shared and read only."""
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **T5_SIZES)).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    folder, out = tmp_path_factory.mktemp("t5"), tmp_path_factory.mktemp("versions") / "1"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    export(ExportConfig(str(folder), out, max_model_len=48, max_num_seqs=4), certify=False)
    return folder, out


def nats(model: Any, ids: list[int], num_scored: int) -> float:
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
    return -sum(float(rows[i - 1, ids[i]]) for i in range(len(ids) - num_scored, len(ids)))


def perplexity(folder: Path, data: Path, **settings: Any) -> Evaluation:
    return evaluate(EvaluateConfig(folder, "perplexity", data, **settings))


@pytest.mark.parametrize(("size", "stride"), [(None, None), (16, 5), (32, 31)])
def test_perplexity_is_that_of_the_original_in_the_same_windows(
    llama_version: Path, llama_checkpoint: Path, tokenizer: PreTrainedTokenizerFast, write, size, stride
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    found = perplexity(llama_version, write("text.txt", TEXT), window=size, stride=stride)
    size = size or MAX_MODEL_LEN - 1
    stride = stride or size // 2
    model = AutoModelForCausalLM.from_pretrained(llama_checkpoint).eval()
    expected, end = nats(model, [BOS_ID, *ids[: size - 1]], size - 1), size - 1
    while end < len(ids):
        new = ids[end : end + stride]
        expected += nats(model, [BOS_ID, *ids][end + 1 - (size - stride) : end + 1] + new, len(new))
        end += len(new)
    assert found.counts == {"num_documents": 1, "num_tokens": len(ids), "num_bytes": len(TEXT.encode())}
    assert found.settings == {"window": size, "stride": stride, "limit": None}
    assert found.metrics["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert found.metrics["token_perplexity"] == pytest.approx(math.exp(expected / len(ids)), rel=1e-4)
    assert found.data is not None and found.data["size_bytes"] == len(TEXT.encode())


def test_documents_are_scored_alone_and_a_limit_cuts_tokens_and_their_bytes(
    llama_version: Path, tokenizer: PreTrainedTokenizerFast, write
) -> None:
    documents = [{"text": text} for text in CORPUS[:2]]
    together = perplexity(llama_version, write("all.jsonl", *documents))
    alone = [perplexity(llama_version, write("one.jsonl", document)) for document in documents]
    assert together.counts["num_documents"] == 2
    bits = [one.metrics["bits_per_byte"] * one.counts["num_bytes"] for one in alone]  # type: ignore[operator]
    assert together.metrics["bits_per_byte"] == pytest.approx(sum(bits) / together.counts["num_bytes"])

    num_first = len(tokenizer(CORPUS[0])["input_ids"])
    begin = tokenizer.decode(tokenizer(CORPUS[1])["input_ids"][:7])
    cut = perplexity(llama_version, write("all.jsonl", *documents), limit=num_first + 7)
    written = perplexity(llama_version, write("cut.jsonl", documents[0], {"text": begin}))
    assert cut.counts == {"num_documents": 2, "num_tokens": num_first + 7, "num_bytes": len(CORPUS[0] + begin)}
    assert cut.metrics == written.metrics


def test_the_same_evaluation_gives_the_same_bits(llama_version: Path, write) -> None:
    path = write("text.txt", TEXT * 5)
    first, second = (perplexity(llama_version, path, window=9, stride=2) for _ in range(2))
    assert first == second


def generated(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, **options: Any) -> str:
    """What Hugging Face's ``generate`` writes for ``prompt``."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=2, **options)[0]
    return tokenizer.decode(
        output if model.config.is_encoder_decoder else output[ids.shape[1] :], skip_special_tokens=True
    )


def test_exact_match_counts_the_answers_that_generate_gives(
    llama_version: Path, llama_checkpoint: Path, tokenizer: PreTrainedTokenizerFast, write
) -> None:
    prompts = ["The quick", "Alle Menschen"]
    model = AutoModelForCausalLM.from_pretrained(llama_checkpoint).eval()
    outputs = [generated(model, tokenizer, prompt, repetition_penalty=1.1) for prompt in prompts]
    # The answers go on behind what they are compared with; the next characters stop them.
    stops = [text[6:9] for text in outputs]
    pairs = [
        {"prompt": prompt, "completion": text[: text.index(stop)]}
        for prompt, text, stop in zip(prompts, outputs, stops, strict=True)
    ]
    assert all(pair["completion"].strip() for pair in pairs)
    for pair, stop in zip(pairs, stops, strict=True):
        config = EvaluateConfig(llama_version, "exact-match", write("one.jsonl", pair), stop=(stop,))
        assert evaluate(config).metrics == {"exact_match": 1.0}
    wrong = [{**pair, "completion": pair["completion"] + "?"} for pair in pairs]
    config = EvaluateConfig(llama_version, "exact-match", write("all.jsonl", *wrong, pairs[0]), stop=(stops[0],))
    found = evaluate(config)
    assert found.metrics == {"exact_match": pytest.approx(1 / 3)}
    assert found.counts == {"num_pairs": 3, "num_equal": 1}
    assert [example["line"] for example in found.examples] == [1, 2]
    assert found.examples[0]["source"] == "The quick" and found.examples[0]["answer"] == pairs[0]["completion"]
    assert evaluate(EvaluateConfig(llama_version, "exact-match", config.data, limit=2)).counts["num_pairs"] == 2


def test_exact_match_of_an_encoder_decoder_compares_what_it_writes(
    seq2seq: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, write
) -> None:
    checkpoint, version = seq2seq
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    for source in ("The quick brown fox", "def add(a, b):"):
        text = generated(model, tokenizer, source)
        stop = text[5:8]
        pair = {"source": source, "target": text[: text.index(stop)]}
        data = write("a.jsonl", pair, {**pair, "target": "no"})
        found = evaluate(EvaluateConfig(version, "exact-match", data, stop=(stop,)))
        assert pair["target"].strip() and found.metrics == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("suite", "name", "lines", "error", "words"),
    [
        (
            "exact-match",
            "a.jsonl",
            [{"prompt": "a ", "completion": "b"}] * 2 + [{"prompt": "x"}],
            InvalidData,
            "line 3",
        ),
        (
            "exact-match",
            "a.jsonl",
            [{"prompt": "The " * 60, "completion": "b"}],
            InvalidData,
            "line 1: .*the prompt has",
        ),
        ("exact-match", "a.jsonl", [], InvalidData, "has no pairs"),
        ("perplexity", "a.jsonl", [{"text": "a"}, {"prompt": "b"}], InvalidData, "line 2 has no text"),
        ("perplexity", "a.txt", [], InvalidData, "has no text"),
    ],
)
def test_bad_data_is_an_error_with_its_line(llama_version: Path, write, suite, name, lines, error, words) -> None:
    with pytest.raises(error, match=words):
        evaluate(EvaluateConfig(llama_version, suite, write(name, *lines)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"suite": "bleu"}, "suite has value 'bleu'; expected one of perplexity, exact-match, certificate"),
        ({"suite": "perplexity"}, "perplexity needs something to read; pass --data FILE"),
        ({"suite": "certificate", "data": Path("x")}, "--data means nothing to certificate, which takes no options"),
        ({"suite": "exact-match", "data": Path("x"), "window": 3}, "--window means nothing to exact-match"),
        ({"suite": "perplexity", "data": Path("x"), "limit": 0}, "limit has value 0; expected a whole number ≥ 1"),
        ({"suite": "exact-match", "data": Path("x"), "stop": ("",)}, "stop has value ''"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        EvaluateConfig(Path("nowhere"), **values)


def test_windows_that_do_not_fit_and_models_that_do_not_are_refused(
    llama_version: Path, seq2seq: tuple[Path, Path], write
) -> None:
    path = write("a.txt", "text")
    with pytest.raises(InvalidConfig, match="window has value 48; this version reads 2 to 47 tokens at once"):
        perplexity(llama_version, path, window=48)
    with pytest.raises(InvalidConfig, match="stride has value 9; expected less than the window of 9 tokens"):
        perplexity(llama_version, path, window=9, stride=9)
    with pytest.raises(InvalidConfig, match=r"is of kind encoder_decoder; suites for it: exact-match, certificate"):
        perplexity(seq2seq[1], path)


def test_certificate_gives_its_verdict_and_numbers_or_says_that_there_is_none(
    llama_version: Path, tmp_path: Path
) -> None:
    from triton_backend.version_folder import read_manifest, seal

    with pytest.raises(InvalidVersion, match="has no certificate; export it again"):
        evaluate(EvaluateConfig(llama_version, "certificate"))
    folder = Path(shutil.copytree(llama_version, tmp_path / "version"))
    summary = {"passed": False, "precision": "fp32", "agreement": 0.5, "kl_mean": None, "failed": ["min_agreement"]}
    (folder / "certificate.json").write_text(json.dumps({"summary": summary}))
    with pytest.raises(ExportError, match=r"certificate\.json is not listed"):
        evaluate(EvaluateConfig(folder, "certificate"))
    source = read_manifest(folder)["source"]
    (folder / "manifest.json").unlink()
    digest = seal(folder, source, {})
    found = evaluate(EvaluateConfig(folder, "certificate"))
    assert found.metrics == {"passed": False, "agreement": 0.5}
    assert (found.digest, found.data, found.examples) == (digest, None, ({"failed": "min_agreement"},))


def test_the_program_prints_events_and_ends_with_an_exit_code(llama_version: Path, write) -> None:
    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        command = [sys.executable, "-m", "exporters.evaluate", str(llama_version), *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        return result.returncode, [json.loads(line) for line in result.stdout.splitlines()]

    exit_code, events = run("--suite", "perplexity", "--data", str(write("a.txt", TEXT)), "--limit", "30")
    assert exit_code == 0
    said = [event["event"] for event in events if event["event"] != "progress"]  # at most one a second
    assert said == ["started", "step", "step", "finished"]
    last = events[-1]
    assert last["suite"] == "perplexity" and set(last["metrics"]) == {"bits_per_byte", "token_perplexity"}
    assert last["folder"] == str(llama_version) and len(last["digest"]) == len(last["data"]["sha256"]) == 64
    exit_code, events = run("--suite", "exact-match", "--data", str(write("b.jsonl", "{}\n")))
    assert (exit_code, events[-1]["event"], events[-1]["code"]) == (1, "error", "INVALID_DATA")
    assert "b.jsonl, line 1 has nothing; expected source and target" in events[-1]["message"]
    assert run("--suite", "nothing") == (2, [])
