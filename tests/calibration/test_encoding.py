"""BOS, cut replies and special tokens in text: one rule wherever text becomes tokens."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from support import command_line
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastprune
from fastprune.calibration import Encoder, load_calibration, read_rows
from fastprune.calibration.rows import Row
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning
from fastprune.evaluation import EvaluationSuite, generate, perplexity, recognition
from fastprune.evaluation.forward import Forward

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<asst>", "<turn>", "[gMASK]", "\n", "w", "o", "r", "d", *"abcefghyesn"]
TEMPLATE = (
    "<bos>{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<asst>' }}{{ m['content'] | trim }}<turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<asst>{% endif %}"
)
BOS, GMASK = WORDS.index("<bos>"), WORDS.index("[gMASK]")


def tokenizer_of(single: str | None, bos_token: str | None = "<bos>") -> PreTrainedTokenizerFast:
    """One token per letter; ``single`` is what it writes around a text by default."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if single is not None:
        special = [(word, vocabulary[word]) for word in ("<bos>", "<eos>", "[gMASK]")]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=special)
    extra = ["<user>", "<asst>", "<turn>", "[gMASK]"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos_token,
        eos_token="<eos>",
        additional_special_tokens=extra,
        chat_template=TEMPLATE,
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, **size)).eval()


class TestBos:
    @pytest.mark.parametrize(
        ("single", "rule", "expected"),
        [
            ("<bos> $A", "auto", [BOS]),  # Llama 3, Gemma
            ("<bos> $A <eos>", "auto", [BOS]),  # what comes behind is not added
            ("$A <eos>", "auto", []),
            (None, "auto", []),  # GPT-2, Qwen: a BOS that is never written
            ("[gMASK] <bos> $A", "auto", [GMASK, BOS]),  # GLM
            ("<bos> $A", False, []),
            (None, True, [BOS]),
            ("<bos> $A", True, [BOS]),
            ("[gMASK] <bos> $A", True, [GMASK, BOS]),
        ],
    )
    def test_it_is_put_where_encoding_a_word_puts_it(self, single, rule, expected) -> None:
        tokenizer = tokenizer_of(single)
        encoder = Encoder(tokenizer, bos=rule)
        plain = tokenizer("ab\n", add_special_tokens=False)["input_ids"]
        assert encoder.context("ab") == expected + plain
        example = encoder.example(Row("ab", "c"))
        assert list(example.input_ids) == [*expected, *plain, WORDS.index("c")]
        assert example.scored == 1
        assert encoder.facts == {"format": "raw", "bos": {"rule": rule, "ids": expected}, "template": None}

    def test_a_prompt_that_brings_it_as_text_has_it_once(self) -> None:
        encoder = Encoder(tokenizer_of("<bos> $A"))
        assert encoder.context("<bos>ab") == encoder.context("ab")

    @pytest.mark.parametrize("rule", ["always", None, 1, "True"])
    def test_other_rules_are_refused(self, rule) -> None:
        with pytest.raises(ArgumentError, match=r'bos: expected "auto", True or False, got'):
            load_calibration([{"prompt": "a", "response": "b"}], tokenizer_of(None), bos=rule)

    def test_a_tokenizer_without_one_cannot_write_it(self) -> None:
        tokenizer = tokenizer_of(None, bos_token=None)
        assert Encoder(tokenizer).context("a") == Encoder(tokenizer, bos=False).context("a")
        with pytest.raises(ArgumentError, match="bos: expected a tokenizer with a BOS token"):
            Encoder(tokenizer, bos=True)

    @pytest.mark.parametrize("rule", [True, False])
    def test_a_template_decides_for_itself(self, rule) -> None:
        with pytest.raises(ArgumentError, match="bos: expected 'auto' with format='chat'"):
            Encoder(tokenizer_of("<bos> $A"), format="chat", bos=rule)
        context = Encoder(tokenizer_of("<bos> $A"), format="chat").context("a")
        assert context.count(BOS) == 1

    def test_one_rule_for_generation_recognition_prefill_and_perplexity(self, monkeypatch) -> None:
        tokenizer, llama = tokenizer_of("<bos> $A"), model()
        seen: list[torch.Tensor] = []
        forward = Forward.__call__

        def watched(self, input_ids, *rest, **more):
            seen.append(input_ids)
            return forward(self, input_ids, *rest, **more)

        monkeypatch.setattr(Forward, "__call__", watched)
        rows = [{"prompt": "ab", "response": "cc", "prefill": "e"}, {"prompt": "ba", "response": "cd", "prefill": "f"}]
        asked = [{"prompt": "ab", "response": "y"}, {"prompt": "ba", "response": "n"}]
        runs = {
            "generate": lambda **bos: generate(llama, tokenizer, rows, max_new_tokens=1, **bos),
            "recognition": lambda **bos: recognition(llama, tokenizer, asked, answers=("y", "n"), **bos),
            "perplexity of rows": lambda **bos: perplexity(llama, tokenizer, rows, **bos),
            "perplexity of texts": lambda **bos: perplexity(llama, tokenizer, ["abc", "cba"], **bos),
            "perplexity in windows": lambda **bos: perplexity(llama, tokenizer, ["abcabc"], window=3, **bos),
            "suite": lambda **bos: EvaluationSuite(tokenizer, harm_rows=rows, skill_rows={"s": rows}, **bos).run(llama),
        }
        for name, run in runs.items():
            for bos, begins in (({}, True), ({"bos": False}, False)):
                seen.clear()
                run(**bos)
                found = {row.tolist().count(BOS) for ids in seen for row in ids if len(row) > 1}
                assert found == {int(begins)}, f"{name}, {bos}"

    def test_every_token_of_a_text_is_scored_behind_a_bos_and_all_but_the_first_without(self) -> None:
        tokenizer, llama = tokenizer_of("<bos> $A"), model()
        assert perplexity(llama, tokenizer, ["abcab"]).n_tokens == 5
        assert perplexity(llama, tokenizer, ["abcab"], bos=False).n_tokens == 4
        windows = perplexity(llama, tokenizer, ["abcab"], window=3)
        assert (windows.n_tokens, windows.n_examples) == (5, 3)
        assert perplexity(llama, tokenizer, ["a"]).n_tokens == 1
        with pytest.raises(CalibrationError, match="expected at least 2"):
            perplexity(llama, tokenizer, ["a"], bos=False)

    def test_provenance_says_which_rule_and_which_ids(self) -> None:
        tokenizer, llama = tokenizer_of("<bos> $A"), model()
        rows = [{"prompt": "ab", "response": "cc"}]
        scores = fastprune.score(
            llama,
            load_calibration(rows, tokenizer),
            load_calibration(rows, tokenizer, bos=False),
            progress=False,
            p_max=0.1,
            q_max=0.1,
        )
        harm, benign = (scores.provenance["calibration"][role] for role in ("harm", "benign"))
        assert harm["bos"] == {"rule": "auto", "ids": [BOS]} and benign["bos"] == {"rule": False, "ids": []}
        assert scores.select(0.1, 0.1).metadata["calibration"]["harm"]["bos"] == harm["bos"]


class TestFinish:
    def test_the_end_of_a_reply_that_was_cut_is_no_part_of_the_example(self) -> None:
        encoder = Encoder(tokenizer_of("<bos> $A"), format="chat")
        whole, cut = (encoder.example(Row("a", "bc", finish=finish)) for finish in ("stop", "length"))
        assert whole.input_ids[:-1] == cut.input_ids and whole.labels[:-1] == cut.labels
        assert whole.labels[-1] == WORDS.index("<turn>") and whole.ends_turn and not cut.ends_turn
        assert encoder.example(Row("a", "bc")) == whole
        assert encoder.example(Row("a", "bc"), finish="length") == cut
        assert encoder.example(Row("a", "bc", finish="stop"), finish="length") == whole  # the row knows better

    def test_it_is_a_column_or_an_option_of_the_set(self, tmp_path) -> None:
        rows = [{"prompt": "a", "response": "b", "finish": finish} for finish in ("length", "stop", None)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "rows.csv").write_text("prompt,response,finish\na,b,length\na,b,stop\na,b,\n")
        tokenizer = tokenizer_of("<bos> $A")
        for source in (rows, tmp_path / "rows.jsonl", tmp_path / "rows.csv"):
            as_given = load_calibration(source, tokenizer, format="chat")
            assert [example.scored for example in as_given] == [1, 2, 2] and as_given.finishes == {
                "stop": 1,
                "length": 1,
                "unknown": 1,
            }
            by_option = load_calibration(source, tokenizer, format="chat", finish="length")
            assert [example.scored for example in by_option] == [1, 2, 1] and by_option.finishes["length"] == 2

    def test_perplexity_heeds_it(self) -> None:
        tokenizer, llama = tokenizer_of("<bos> $A"), model()
        rows = [{"prompt": "a", "response": "bc"}]
        cut = [{**rows[0], "finish": "length"}]
        assert perplexity(llama, tokenizer, rows, format="chat").n_tokens == 3
        assert perplexity(llama, tokenizer, cut, format="chat").n_tokens == 2
        assert perplexity(llama, tokenizer, rows, format="chat", finish="length").n_tokens == 2

    def test_other_words_are_refused(self) -> None:
        row = {"prompt": "a", "response": "b"}
        with pytest.raises(CalibrationError, match=r"row 0: finish: expected one of \('stop', 'length'\)"):
            read_rows([{**row, "finish": "eos_token"}])
        with pytest.raises(ArgumentError, match=r"finish: expected one of \('stop', 'length'\) or None, got 'cut'"):
            load_calibration([row], tokenizer_of(None), finish="cut")
        with pytest.warns(FastpruneWarning, match="column 'finished' is not used; did you mean 'finish'"):
            read_rows([{**row, "finished": "length"}])

    def test_many_replies_of_one_length_are_pointed_out(self) -> None:
        tokenizer = tokenizer_of("<bos> $A")
        rows = [{"prompt": "a", "response": "b" * length} for length in (9, 9, 9, 4, 5, 6)]
        with pytest.warns(FastpruneWarning, match="3 of 6 replies have exactly 9 tokens"):
            load_calibration(rows, tokenizer, format="chat")
        quiet = [
            {"format": "raw"},  # no end of turn is scored
            {"format": "chat", "finish": "length"},
            {"format": "chat", "finish": "stop"},
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for settings in quiet:
                load_calibration(rows, tokenizer, **settings)
            load_calibration([*rows, rows[-1]], tokenizer, format="chat")  # less than half
            load_calibration([{"prompt": "a", "response": "yes"}] * 9, tokenizer, format="chat")  # short by nature

    def test_a_large_share_of_the_loss_on_the_end_of_turn_is_pointed_out(self) -> None:
        tokenizer, llama = tokenizer_of("<bos> $A"), model()
        # replies of one or two tokens: the end of turn is a third to a half of a random model's loss
        rows = [{"prompt": "a" * n, "response": "b" * (1 + n % 2)} for n in range(1, 7)]
        with pytest.warns(FastpruneWarning, match=r"harm_loader: the end-of-turn token carries (3|4)\d% of the loss"):
            scores = fastprune.score(llama, load_calibration(rows, tokenizer, format="chat"), progress=False, q_max=0.1)
        with torch.no_grad():
            ends = total = 0.0
            for example in load_calibration(rows, tokenizer, format="chat"):
                logits = llama(torch.tensor([example.input_ids])).logits[0, :-1].double()
                labels = torch.tensor(example.labels[1:])
                losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none") / example.scored
                ends, total = ends + float(losses[-1]), total + float(losses.sum())
        assert scores.provenance["calibration"]["harm"]["end_of_turn_share"] == pytest.approx(ends / total, abs=6e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = load_calibration(rows, tokenizer, format="chat", finish="stop")  # said to be as they are
            assert fastprune.score(llama, whole, progress=False, q_max=0.1)
            cut = load_calibration(rows, tokenizer, format="chat", finish="length")
            raw = load_calibration(rows, tokenizer)
            for group in (cut, raw):
                scores = fastprune.score(llama, group, progress=False, q_max=0.1)
                assert scores.provenance["calibration"]["harm"]["end_of_turn_share"] == 0.0


def test_special_tokens_in_raw_text_are_pointed_out() -> None:
    rows = [{"prompt": "<user>a<turn>", "response": "b"}, {"prompt": "a", "response": "b"}]
    with pytest.warns(FastpruneWarning, match="1 of 2 rows hold special tokens as text"):
        load_calibration(rows, tokenizer_of("<bos> $A"))


def test_template_arguments_and_system_belong_to_chat() -> None:
    for extra in ({"template_args": {"a": 1}}, {"system": "a"}):
        with pytest.raises(ArgumentError, match=f"{next(iter(extra))}: expected format='chat', got format='raw'"):
            load_calibration([{"prompt": "a", "response": "b"}], tokenizer_of(None), **extra)


def test_whole_numbers_that_pandas_made_floats_are_names() -> None:
    import numpy as np

    rows = [{"prompt": "a", "response": "b", "id": value} for value in (1.0, np.int64(2), np.float32(3), float("nan"))]
    assert [row.id for row in read_rows(rows)] == ["1", "2", "3", None]
    for value in (1.5, float("inf"), True):
        with pytest.raises(CalibrationError, match="id: expected a string"):
            read_rows([{"prompt": "a", "response": "b", "id": value}])


class TestCommandLine:
    @pytest.fixture
    def folder(self, tmp_path):
        model().save_pretrained(tmp_path / "model")
        tokenizer_of("<bos> $A").save_pretrained(tmp_path / "model")
        rows = [{"prompt": "a" * n, "response": "bc" * n} for n in range(1, 5)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path

    def provenance(self, folder, *options: str) -> dict:
        rows, out = folder / "rows.jsonl", folder / "scores.safetensors"
        words = ["score", folder / "model", "--harm", rows, "--out", out, "--q-max", "0.1", *options]
        assert command_line.run(*words, "--force") == 0
        return fastprune.Scores.load(out).provenance["calibration"]["harm"]

    @pytest.mark.filterwarnings("ignore::fastprune.errors.FastpruneWarning")
    def test_the_options_reach_the_examples(self, folder, capsys) -> None:
        assert self.provenance(folder)["bos"] == {"rule": "auto", "ids": [BOS]}
        assert self.provenance(folder, "--bos", "false")["bos"] == {"rule": False, "ids": []}
        whole = self.provenance(folder, "--format", "chat")
        for finish in ("length", "harm=length"):
            cut = self.provenance(folder, "--format", "chat", "--finish", finish)
            assert whole["n_scored_tokens"] - cut["n_scored_tokens"] == 4 and cut["finishes"]["length"] == 4
        assert self.provenance(folder, "--format", "chat", "--finish", "benign=length")["finishes"]["unknown"] == 4
        words = (
            "score",
            folder / "model",
            "--harm",
            folder / "rows.jsonl",
            "--force",
            "--out",
            folder / "s.safetensors",
        )
        assert command_line.run(*words, "--finish", "other=length") == 1
        expected = "--finish: expected length, stop, or one of these for harm or benign"
        assert expected in capsys.readouterr().err
        assert command_line.run(*words, "--template-args", "enable_thinking") == 1
        assert "--template-args: expected a JSON object or NAME=VALUE" in capsys.readouterr().err
