"""lm-eval's requests beside the library's own functions, its tasks and both command lines."""

import functools
import importlib.util
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from lm_eval import __main__ as harness_cli
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig

import retro_jax as rj
from retro_jax import models
from retro_jax.experiments.evals import __main__ as registered
from retro_jax.experiments.evals import language_model, scoring
from retro_jax.experiments.evals.arguments import read_arguments
from retro_jax.experiments.evals.command import Eval
from retro_jax.experiments.evals.generation import read_options
from retro_jax.experiments.evals.language_model import RetroJaxLM
from retro_jax.experiments.evals.scoring import groups
from retro_jax.models import ModelConfig, Tokenizer
from tests.models.byte_tokenizer import byte_backend

ATOL = 2e-4  # sums of up to 40 float32 log-likelihoods of order ten
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPARSE = rj.DecodeConfig(
    "quest", page_size=8, budget_tokens=16, dense_layers=0, sink_pages=0, prefill_chunk=16
)
SHARED = "Each question is about a sea, a town or a bird, and each answer is one word."
PAIRS = [
    ("", " no"),
    ("Tern", " yes, it is a gull"),
    ("A longer one, of fifty bytes that no other has.", "s"),
    *(
        (SHARED + end, answer)
        for end in (" Is it?", " Now?")
        for answer in (" no", " yes, it is a gull", "s")
    ),
]


@functools.cache
def tiny() -> rj.Model:
    config = ModelConfig("tiny-bytes", 259, 1, 2, 1, 16, 32, 64, max_positions=256)
    tokenizer = Tokenizer(byte_backend(), "<|begin|>", "<|im_end|>", add_bos=True, chat_template=TEMPLATE)
    return rj.Model(config, models.random_params(config, jax.random.key(1)), tokenizer)


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def encoded(context, continuation):
    """Both as token ids, one after the other, and how many of them are the context's."""
    encode = tiny().tokenizer.encode
    return np.array(encode(context + continuation)), len(encode(context))


def dense(ids, count):
    """Logarithms of probabilities of the last tokens, and which are greedy, by the plain forward pass."""
    logits = np.asarray(models.forward(tiny().params, tiny().config, np.pad(ids, (0, 128 - len(ids)))[None]))
    rows = logits[0, count - 1 : len(ids) - 1].astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    targets = ids[count:]
    return logprobs[np.arange(len(targets)), targets], rows.argmax(-1) == targets


def dense_model(**options):
    return RetroJaxLM(tiny(), SPARSE, mode="prefill", batch_size=2, **options)


def test_dense_passes_give_the_models_likelihoods():
    found = dense_model().loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        expected, hits = dense(*encoded(context, continuation))
        assert logprob == pytest.approx(expected.sum(), abs=ATOL)
        assert greedy == hits.all()


def test_a_sparse_method_decides_about_every_token(monkeypatch):
    monkeypatch.setattr(scoring, "MOST_STEPS", 8)
    evaluated = RetroJaxLM(tiny(), SPARSE, batch_size=2)
    assert evaluated.mode == "decode"
    assert RetroJaxLM(tiny(), rj.DecodeConfig("full")).mode == "prefill"
    found = evaluated.loglikelihood(requests("loglikelihood", PAIRS))
    texts = [encoded(*pair) for pair in PAIRS]
    # The last token of the context is a step too, so that the first of the continuation is not dense.
    prompts = [max(count - 1, 1) for _, count in texts]
    scored = rj.score(tiny(), [ids for ids, _ in texts], SPARSE, prompts, steps_per_call=32)
    for (ids, count), (logprob, greedy), nll, hits in zip(texts, found, scored.nll, scored.hits, strict=True):
        part = slice(1 if count > 1 else 0, np.isfinite(nll).sum())
        assert part.stop - part.start == len(ids) - count
        assert logprob == pytest.approx(-nll[part].sum(), abs=ATOL)
        assert greedy == hits[part].all()
    one_token = PAIRS.index((SHARED + " Is it?", "s"))
    assert abs(found[one_token][0] - dense(*texts[one_token])[0].sum()) > 1e-3


@pytest.mark.parametrize("mode", scoring.MODES)
def test_a_greedy_continuation_is_one(mode):
    ids = np.array(
        tiny().tokenizer.encode("What")
    )  # within the budget, so that both modes are full attention
    while len(ids) < 8:
        logits = models.forward(tiny().params, tiny().config, np.pad(ids, (0, 128 - len(ids)))[None])
        ids = np.append(ids, np.argmax(logits[0, len(ids) - 1]))
    context, reply = ids[:5].tolist(), ids[5:].tolist()
    asked = [(None, context, reply), (None, context, [*reply[:-1], (reply[-1] + 1) % 259])]
    found = RetroJaxLM(tiny(), SPARSE, mode=mode, batch_size=2)._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [True, False]


def test_contexts_are_read_once_and_what_they_share_once(monkeypatch):
    read = []

    def run_prefill(model, config, state, ids, progress=None):
        read.append([len(row) for row in ids])
        return prefill(model, config, state, ids, progress)

    prefill = scoring.run_prefill
    monkeypatch.setattr(scoring, "run_prefill", run_prefill)
    pairs = [pair for pair in PAIRS if pair[0].startswith(SHARED)]
    dense_model().loglikelihood(requests("loglikelihood", pairs))
    # A space is shared too; the last token is left to what goes on from it.
    assert read == [[2 + len(SHARED)], [5, 3]]
    read.clear()
    more = [(f"{SHARED} Is {n}", " no") for n in "abc"]
    dense_model().loglikelihood(requests("loglikelihood", more))
    assert read == [[5 + len(SHARED)], [0, 0], [0]]  # for both batches


def test_contexts_that_begin_alike_are_groups_longest_first():
    alike = [(1,) * 64 + (7,) * n for n in (2, 9, 5)]
    others = [(n,) * n for n in (3, 8, 70)]
    assert list(groups([*others, *alike], 2)) == [others[:0:-1], others[:1], [alike[1], alike[2], alike[0]]]
    assert list(groups([*alike[:2], *others], 3)) == [[alike[1], others[2], alike[0]], others[1::-1]]


def test_whole_texts_in_windows():
    text = "The tide came in over the flats, and the birds rose from them all at once."
    evaluated = dense_model(max_length=32)
    (total, short) = evaluated.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,), ("Sea",)]))
    ids, begin = np.array(tiny().tokenizer.encode(text)), tiny().tokenizer.bos_id
    assert len(ids) == 75  # windows of 32, 32 and 11 tokens
    expected = [
        dense(np.concatenate([[begin], ids[:32]]), 1)[0],
        dense(ids[31:64], 1)[0],
        dense(ids[42:75], 22)[0],
    ]
    assert sum(map(len, expected)) == 75
    assert total == pytest.approx(sum(part.sum() for part in expected), abs=5 * ATOL)
    sea = np.array([begin, *tiny().tokenizer.encode("Sea")])
    assert short == pytest.approx(dense(sea, 1)[0].sum(), abs=ATOL)


def test_replies_are_those_of_generate(caplog):
    contexts = ["A gull", "A tern and a gull sat on a rail", "x" * 300]
    encode = tiny().tokenizer.encode
    prompts = [encode(context)[-232:] for context in contexts]
    free = rj.generate(tiny(), prompts, SPARSE, 24).texts
    stop = free[0][10:12]
    assert 0 < free[0].index(stop) < 11
    plain = {"until": ["Question:", "<|im_end|>"], "max_gen_toks": 24}
    asked = [(context, plain) for context in contexts]
    asked.append((contexts[0], {"until": [stop], "max_tokens": 24}))
    found = RetroJaxLM(tiny(), SPARSE, batch_size=2).generate_until(requests("generate_until", asked))
    assert found[:3] == free and found[3] == free[0][: free[0].index(stop)]
    assert "1 of 4 contexts do not fit 256 positions and lose their beginning, up to 69 tokens" in caplog.text


def test_a_draw_follows_the_place_of_its_request(monkeypatch):
    calls = []

    def generate_many(model, requests, config, max_new_tokens, *, sampling, **options):
        calls.append((sampling, requests))
        return [
            SimpleNamespace(index=index, text=request.prompt[-1]) for index, request in enumerate(requests)
        ]

    monkeypatch.setattr(language_model, "generate_many", generate_many)
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.7, "top_k": 20}
    asked = [("a", {"max_gen_toks": 9}), ("c", drawn), ("bd", drawn)]
    found = RetroJaxLM(tiny(), SPARSE, seed=5).generate_until(requests("generate_until", asked))
    assert found == [tiny().tokenizer.encode(text)[-1] for text in "acd"]
    (greedy, (plain,)), (sampling, (first, second)) = calls  # the longest prompt is first
    assert greedy == rj.Sampling(seed=5) and (plain.key, plain.max_new_tokens) == (None, 9)
    assert sampling == rj.Sampling(0.7, top_k=20, seed=5)
    root = jax.random.key(5, impl="threefry2x32")
    assert first.key == jax.random.fold_in(root, 2) and second.key == jax.random.fold_in(root, 1)


def test_too_long_contexts_lose_their_beginning_and_too_long_answers_are_refused(caplog):
    evaluated = dense_model(max_length=20)
    (found,) = evaluated.loglikelihood(requests("loglikelihood", [("y" * 30, "abcdef")]))
    ids, _ = encoded("y" * 30, "abcdef")
    assert found[0] == pytest.approx(dense(ids[-21:], 15)[0].sum(), abs=ATOL)
    assert "1 of 1 contexts do not fit 20 positions and lose their beginning, up to 16" in caplog.text
    with pytest.raises(ValueError, match="a continuation of 21 tokens does not fit 20 positions"):
        evaluated.loglikelihood(requests("loglikelihood", [("y", "z" * 21)]))
    with pytest.raises(ValueError, match="max_gen_toks 20 leaves no room for a context in 20 positions"):
        evaluated.generate_until(requests("generate_until", [("y", {"max_gen_toks": 20})]))


def test_chat_templates(caplog):
    evaluated = dense_model()
    asked = [{"role": "user", "content": "Which bird?"}]
    assert evaluated.chat_template(True) == TEMPLATE
    begun = evaluated.apply_chat_template(asked)
    assert begun == "<|im_start|>user\nWhich bird?<|im_end|>\n<|im_start|>assistant\n"
    answer = [*asked, {"role": "assistant", "content": "The answer is "}]
    # The template trims, so that the space that the message ends with goes, as transformers have it.
    assert evaluated.apply_chat_template(answer, False) == begun + "The answer is"
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    evaluated.tokenizer = Tokenizer(byte_backend(), "<|begin|>", "<|im_end|>", chat_template=strict)
    assert evaluated.apply_chat_template([{"role": "system", "content": "Be brief"}, *asked]) == begun
    assert "the system message is left out: the model's chat template refuses" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation option num_beams=4 is not supported; use until"),
        ({"do_sample": True}, "do_sample is true at temperature 0, which is greedy"),
        ({"max_gen_toks": 0}, "max_gen_toks 0 must be at least 1"),
        ({"top_p": 2.0, "temperature": 1.0}, "top_p 2.0 is not in"),
    ],
)
def test_generation_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        read_options(tiny().tokenizer, options, 16, 0)


def test_generation_options():
    options = {"until": ["\n", "<|im_start|>"], "num_beams": 1, "max_new_tokens": 5, "do_sample": False}
    wanted = read_options(tiny().tokenizer, options | {"temperature": 0.9}, 16, 3)
    assert wanted.sampling == rj.Sampling(seed=3) and wanted.max_new_tokens == 5
    assert wanted.stop == ("\n",) and wanted.stop_tokens == (1, 2)  # special tokens are no text


@pytest.mark.parametrize(
    ("given", "flags", "message"),
    [
        ({"pretrained": "m", "budjet_tokens": 8}, {}, r"'budjet_tokens' is unknown \(did you mean 'budget_t"),
        ({"preset": "mean-key"}, {}, "no model is named"),
        ({"pretrained": "m", "budget_tokens": 9.5}, {}, r"budget_tokens=9\.5 is float, not int or None"),
        ({"pretrained": "m", "seed": True}, {}, "seed=True is bool, not int"),
        ({"pretrained": "m", "preset": "mean-kay"}, {}, "did you mean 'mean-key'"),
        (
            {"pretrained": "m", "method": "full"},
            {"batch_size": "auto"},
            "is no number, and none is searched for",
        ),
        ({"pretrained": "m", "method": "full"}, {"device": "mps"}, "device 'mps' cannot be chosen"),
        ({"pretrained": "m"}, {"max_batch_size": 9}, "leave --max_batch_size out"),
        ({"pretrained": "m", "budget_tokens": 0}, {}, "budget_tokens 0"),
        ({"pretrained": "m", "score": "learned"}, {}, "--score learned needs --learned FOLDER"),
    ],
)
def test_model_arguments_that_cannot_be(given, flags, message):
    with pytest.raises(ValueError, match=message):
        read_arguments(given, flags)


def test_a_learned_score_is_named_by_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_arguments({"pretrained": "m", "score": "learned", "learned": str(tmp_path / "nowhere")}, {})


def test_model_arguments_that_the_model_refuses():
    with pytest.raises(ValueError, match="mode 'dense' is unknown; use one of decode, prefill"):
        RetroJaxLM(tiny(), SPARSE, mode="dense")
    with pytest.raises(ValueError, match=r"max_length 300 is not within 2\.\.256"):
        RetroJaxLM(tiny(), SPARSE, max_length=300)
    with pytest.raises(ValueError, match="has no tokenizer, so it cannot read tasks"):
        RetroJaxLM(rj.Model(tiny().config, tiny().params, None), SPARSE)


def test_the_harness_loads_the_model_by_name(tiny_folder, monkeypatch):
    arguments = f"pretrained={tiny_folder},preset=mean-key,budget_tokens=32,max_length=64"
    found = SimpleNamespace()
    flags = {"batch_size": "2", "max_batch_size": None, "device": EvaluatorConfig().device}

    def cli_evaluate():
        found.model = get_model("retro_jax").create_from_arg_string(arguments, flags)

    monkeypatch.setattr(harness_cli, "cli_evaluate", cli_evaluate)
    registered.main()
    model = found.model
    assert (model.batch_size, model.max_length, model.mode) == (2, 64, "decode")
    assert model.config == rj.DecodeConfig(**rj.PRESETS["mean-key"], budget_tokens=32)
    assert model.get_model_info()["decode_config"]["score"] == "mean_key"


TASK = """
task: birds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: [gull, tern]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_a_task_end_to_end(json_command, failure, monkeypatch, tmp_path):
    monkeypatch.setattr(Eval, "load", lambda *_, **__: tiny())
    questions = [{"question": f"Bird {n}:", "answer": n % 2} for n in range(5)]
    data, task, out = tmp_path / "birds.jsonl", tmp_path / "birds.yaml", tmp_path / "out"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task.write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    command = ["eval", "tiny", "--tasks", task, "--limit", 4, "--mode", "prefill", "--batch-size", 2]
    command += ["--method", "quest", "--page-size", 8, "--budget-tokens", 16, "--dense-layers", 0]
    command += ["--sink-pages", 0, "--prefill-chunk", 16]
    values = json_command(*command, "--out", out)
    assert values["mode"] == "prefill" and rj.DecodeConfig(**values["config"]) == SPARSE
    assert values["n-samples"]["birds"] == {"original": 5, "effective": 4}
    answers = [json.loads(line) for line in (out / "answers_birds.jsonl").read_text().splitlines()]
    right = [
        max((0, 1), key=lambda choice, each=each: float(each["filtered_resps"][choice][0])) == n % 2
        for n, each in enumerate(answers)
    ]
    assert values["results"]["birds"]["acc,none"] == np.mean(right)
    assert json.loads((out / "results.json").read_text()) == values
    assert "| birds" in (out / "table.md").read_text()
    assert "exists and is not overwritten" in failure(*command, "--out", out)


def test_what_cannot_be_evaluated(failure, monkeypatch, tmp_path):
    refused = functools.partial(failure, "eval", "random:tiny")
    assert "name --tasks, such as" in refused()
    assert "there is no file birds.yaml" in refused("--tasks", "birds.yaml")
    assert "--limit 0.0 must be above 0" in refused("--tasks", "mmlu", "--limit", 0)
    assert "--limit 2.5 must be a whole number" in refused("--tasks", "mmlu", "--limit", 2.5)
    assert "correct --include-path" in refused("--tasks", "mmlu", "--include-path", tmp_path / "no")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'retro-jax[lm-eval]'" in refused("--tasks", "mmlu")
