"""The training script: what it learns from, how it resumes, what it saves."""

import json
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    EncoderDecoderCache,
    T5ForConditionalGeneration,
)

import convert
from architectures.t5 import load
from architectures.t5_session import T5Session
from decoder import generate
from system.errors import InputError
from training import corpus, tatoeba, together, train

WORDS = ["ba", "be", "bi", "bo", "da", "de", "di", "do", "ga", "ge", "gi", "go"]


def write_pairs(path: Path, lines: int = 500) -> Path:
    """Words and the same words backwards: short, learnable, plenty."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(lines):
            words = [WORDS[i] for i in rng.integers(0, 12, rng.integers(2, 6))]
            file.write(f"{' '.join(words)}\t{' '.join(words[::-1])}\n")
    return path


SMALL = {
    "vocabulary": 150,
    "width": 64,
    "decoder-layers": 2,
    "encoder-layers": 1,
    "batch": 32,
    "minutes": 0.2,
    "device": "cpu",
}

SPECIAL = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1}


def arguments(output: Path, **changes) -> Namespace:
    """The script's arguments for a small model, parsed."""
    options = SMALL | {name.replace("_", "-"): value for name, value in changes.items()}
    command = ["train.py", str(output.parent / "pairs.tsv"), "--output", str(output)]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}"] + ([] if value is True else [str(value)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        return train.arguments()


def run(output: Path, **changes) -> None:
    start(train, arguments(output, **changes))


def start(script, args: Namespace) -> None:
    """The whole script, on a clock that ticks 0.05 s at a look: no machine is slow."""
    ticks = count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "arguments", lambda: args)
        patch.setattr(corpus, "HELD_OUT", 100)
        patch.setattr(train, "time", Namespace(monotonic=lambda: next(ticks) / 20))
        script.main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with pairs and a target that the script has trained on them."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "pairs.tsv")
    run(folder / "target")
    return folder


def log(folder: Path) -> list[dict]:
    lines = (folder / "training/log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_target_learns_and_runs_everywhere(trained):
    records = log(trained / "target")
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert held_out[-1] < 2.0  # about log(23) = 3.1 without learning
    oracle = T5ForConditionalGeneration.from_pretrained(trained / "target").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "target")
    assert oracle.config.vocab_size == len(tokenizer)
    convert.convert(trained / "target", trained / "mlx")
    session = T5Session(load(trained / "mlx"))
    for text in ("ba be", "go ge gi da"):
        ids = tokenizer(text).input_ids
        theirs = greedy(oracle, ids, 12)
        commits = generate(session, None, [ids], eos_tokens={1}, max_tokens=12)
        assert [t for commit in commits for t in commit.tokens] == theirs


def greedy(oracle: T5ForConditionalGeneration, ids: list[int], most: int) -> list[int]:
    """What transformers generates, without the start token."""
    # Its own cache: generate() takes its depth from the encoder.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    out = oracle.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=most, cache=cache
    )
    return out[0, 1:].tolist()


def test_distil_and_start_again(trained, capsys):
    """A finished run that is started again has nothing left to do."""
    options = {"teacher": trained / "target", "decoder_layers": 1, "minutes": 0.1}
    options["vocabulary"] = None
    run(trained / "draft", **options)
    said = capsys.readouterr().err
    assert "labelled" in said
    assert ", alpha 0." in said
    teacher = AutoTokenizer.from_pretrained(trained / "target")
    draft = AutoTokenizer.from_pretrained(trained / "draft")
    assert draft.get_vocab() == teacher.get_vocab()
    T5ForConditionalGeneration.from_pretrained(trained / "draft")
    before = (trained / "draft/model.safetensors").read_bytes()
    run(trained / "draft", **options)
    said = capsys.readouterr().err
    assert "resumed at 0.1" in said
    assert "labelled" not in said
    assert (trained / "draft/model.safetensors").read_bytes() == before


def test_killed_run_goes_on_with_its_loss_curve(trained, monkeypatch):
    """Killed after its second save, a run starts where that left it, and ends."""
    saves = count(1)
    checkpoint = train.Trainer.checkpoint

    def dying(self) -> None:
        checkpoint(self)
        if next(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        run(trained / "killed", save_minutes=0.05)
    killed = log(trained / "killed")[-1]
    assert 0.05 * 60 < killed["seconds"] < 0.15 * 60
    run(trained / "killed", save_minutes=0.05)
    after = log(trained / "killed")[log(trained / "killed").index(killed) + 1 :]
    assert after[0]["seconds"] > killed["seconds"]
    assert after[0]["held_out_loss"] == pytest.approx(killed["held_out_loss"], abs=0.3)
    assert after[-1]["seconds"] == pytest.approx(0.2 * 60, abs=0.2)


@pytest.mark.parametrize("v1_1", [None, True])
def test_grown_model_computes_the_same_and_learns(tmp_path, v1_1):
    """New layers are silent, in whatever number, and the first step wakes them."""
    torch.manual_seed(0)
    args = arguments(tmp_path / "x", v1_1=v1_1, decoder_layers=3, encoder_layers=2)
    small = train.new_model(args, 50, SPECIAL)
    small.config.dropout_rate = 0.1  # as the hub's are
    small.save_pretrained(tmp_path / "small")
    small = train.load_t5(tmp_path / "small")
    assert (small.lm_head.weight is small.shared.weight) is (v1_1 is None)
    large = train.grown(small, 5, 7).eval()
    assert large.config.num_layers == len(large.encoder.block) == 5
    assert large.config.num_decoder_layers == len(large.decoder.block) == 7
    ids = torch.tensor([[5, 6, 7, 1], [9, 8, 1, 0]])
    both = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    expected = small(**both).logits
    torch.testing.assert_close(large(**both).logits, expected, atol=1e-5, rtol=0)
    large(**both).logits.square().sum().backward()
    for stack in (large.encoder, large.decoder):
        for block in stack.block:
            assert block.layer[0].SelfAttention.o.weight.grad.abs().max() > 0
            assert block.layer[-1].DenseReluDense.wo.weight.grad.abs().max() > 0
    large.save_pretrained(tmp_path / "large")
    again = train.load_t5(tmp_path / "large")
    torch.testing.assert_close(again(**both).logits, expected, atol=1e-5, rtol=0)
    assert train.grown(small, None, None).config.num_decoder_layers == 3
    with pytest.raises(InputError, match="--decoder-layers is 2, but"):
        train.grown(small, None, 2)


OF_THE_ORIGIN = {"vocabulary": None, "width": None}


def test_training_goes_on_from_a_trained_model(trained):
    options = OF_THE_ORIGIN | {"from": trained / "target"}
    options |= {"encoder_layers": None, "decoder_layers": 4, "minutes": 0.01}
    run(trained / "more", **options)
    before = log(trained / "target")[-1]["held_out_loss"]
    assert log(trained / "more")[0]["held_out_loss"] == pytest.approx(before, abs=0.2)
    model = T5ForConditionalGeneration.from_pretrained(trained / "more")
    assert model.config.num_decoder_layers == 4
    one, other = (
        AutoTokenizer.from_pretrained(trained / n) for n in ("target", "more")
    )
    assert one.get_vocab() == other.get_vocab()


@pytest.fixture(scope="module")
def draft(trained):
    options = {"teacher": trained / "target", "decoder_layers": 1, "vocabulary": None}
    run(trained / "small", minutes=0.05, **options)
    return trained / "small"


def test_together_they_agree_more(trained, draft, examples, capsys):
    """Both move towards the other, the target is still one, and both convert."""
    rng = np.random.default_rng(1)
    lines = [" ".join(WORDS[i] for i in rng.integers(0, 12, 5)) for _ in range(300)]
    (trained / "more.txt").write_text("\n".join(lines))
    command = ["together.py", trained / "pairs.tsv", "--output", trained / "pair"]
    command += ["--target", trained / "target", "--draft", draft, "--minutes", 0.1]
    command += ["--sources", trained / "more.txt", "--decoder-layers", 3]
    command += ["--device", "cpu", "--batch", 32, "--save-minutes", 0.01]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, command)))
        args = together.arguments()
    start(together, args)
    agreement, right = [], []
    for folder, small in ((trained, draft), (trained / "pair", trained / "pair/draft")):
        models = [train.load_t5(folder / "target"), train.load_t5(small)]
        batch = corpus.collate(examples, np.arange(100), 0, torch.device("cpu"))
        _, tokens, agreed, _ = together.mutual(*models, 1.0, batch)
        _, _, hits, _ = train.measure(models[0], batch)
        agreement.append(int(agreed) / int(tokens))
        right.append(int(hits) / int(tokens))
    assert agreement[1] > agreement[0] + 0.02
    assert right[1] > right[0] - 0.1  # 0.3 if all were one token
    labels = corpus.Examples(**np.load(trained / "pair/training/labels.npz"))
    assert len(labels) > 600  # the sources without an answer as well
    for name, layers in (("target", 3), ("draft", 1)):
        convert.convert(trained / "pair" / name, trained / f"pair-{name}")
        assert load(trained / f"pair-{name}").config.num_decoder_layers == layers
    weights = (trained / "pair/draft/model.safetensors").read_bytes()
    capsys.readouterr()
    start(together, args)
    assert "resumed at 0.1" in capsys.readouterr().err
    assert (trained / "pair/draft/model.safetensors").read_bytes() == weights


def test_what_each_learns_from_the_other(trained, draft, examples):
    """Cross-entropy and both divergences, each with a gradient for one model only."""
    pair = {"target": train.load_t5(trained / "target"), "draft": train.load_t5(draft)}
    both = corpus.joined([examples, examples])
    assert len(both) == 2 * len(examples)
    chosen = np.array([3, 77, len(examples) + 3])
    batch = corpus.collate(both, chosen, 0, torch.device("cpu"))
    loss, tokens, agreed, overlap = together.mutual(*pair.values(), 0.3, batch)
    loss.backward()

    expected = dict.fromkeys(("target", "draft"), 0.0)
    same = mass = count = 0
    copies = {name: train.load_t5(trained / "target") for name in pair}
    copies["draft"] = train.load_t5(draft)
    for i in chosen % len(examples):
        source = examples.sources[slice(*examples.source_starts[i : i + 2])]
        labels = examples.targets[slice(*examples.target_starts[i : i + 2])]
        labels = torch.tensor(labels[None]).long()
        p, q = (
            model(input_ids=torch.tensor(source[None]).long(), labels=labels)
            .logits[0]
            .softmax(-1)
            for model in copies.values()
        )
        gold = -p.gather(-1, labels[0][:, None]).log().sum()
        fixed_p, fixed_q = p.detach(), q.detach()
        expected["target"] += gold + 0.3 * (fixed_q * (fixed_q / p).log()).sum()
        expected["draft"] += (fixed_p * (fixed_p / q).log()).sum()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        mass += float(torch.minimum(fixed_p, fixed_q).sum())
        count += labels.numel()
    assert (int(tokens), int(agreed)) == (count, same)
    assert float(overlap) == pytest.approx(mass, rel=1e-4)
    total = float(sum(expected.values()).detach())
    assert loss.item() == pytest.approx(total, rel=1e-4)
    for name, value in expected.items():
        value.backward()
        for ours, theirs in zip(
            pair[name].parameters(), copies[name].parameters(), strict=True
        ):
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_labels_are_the_teachers_greedy_text_and_probabilities(make):
    teacher, folder, _ = make(num_decoder_layers=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sources = ["the cat", "cat sat on the", "a b c", "the cat", "s e t"]
    examples = corpus.from_teacher(
        sources, teacher, tokenizer, torch.device("cpu"), max_tokens=40
    )
    seen = {}
    for i in range(len(examples)):
        first, last = examples.target_starts[i : i + 2]
        begin, end = examples.source_starts[i : i + 2]
        source, target = examples.sources[begin:end], examples.targets[first:last]
        seen[tuple(source)] = target.tolist()
        inputs = torch.tensor([[0, *target[:-1]]])
        with torch.inference_mode():
            logits = teacher(
                input_ids=torch.tensor(source[None]).long(), decoder_input_ids=inputs
            ).logits[0]
        best = logits.softmax(-1).topk(corpus.TOP)
        assert np.array_equal(best.indices[:, 0], target)
        ours = examples.top_probs[first:last].astype(np.float32)
        np.testing.assert_allclose(ours, best.values, atol=1e-3)
        p = logits.softmax(-1)
        chosen = p.gather(-1, torch.tensor(examples.top_ids[first:last]).long())
        np.testing.assert_allclose(ours, chosen, atol=1e-3)
    ended = 0
    for ids in tokenizer(sorted(set(sources))).input_ids:
        theirs = greedy(teacher, ids, 40)
        ended += theirs[-1] == 1
        assert seen.get(tuple(ids)) == (theirs if theirs[-1] == 1 else None)
    assert 0 < ended == len(examples)


def trainer(output: Path, examples, **changes) -> train.Trainer:
    torch.manual_seed(0)
    args = arguments(output, **changes)
    tokenizer = AutoTokenizer.from_pretrained(output.parent / "target")
    model = train.new_model(args, len(tokenizer), SPECIAL)
    sums = partial(train.measure, model)
    return train.Trainer([model], sums, examples, args, torch.device("cpu"))


@pytest.fixture
def examples(trained, monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT", 100)
    tokenizer = AutoTokenizer.from_pretrained(trained / "target")
    return corpus.from_text(corpus.read_columns(trained / "pairs.tsv", 2, 0), tokenizer)


def test_resumed_run_is_the_uninterrupted_one(trained, examples):
    """Weights, both optimizers' momenta and the place in the data come back."""
    whole = trainer(trained / "whole", examples)
    batches = whole.batches()
    losses = [whole.step(next(batches))[0] for _ in range(8)]

    halved = trainer(trained / "halved", examples)
    batches = halved.batches()
    first = [halved.step(next(batches))[0] for _ in range(4)]
    halved.save()
    again = trainer(trained / "halved", examples)
    assert again.resume()
    batches = again.batches()
    assert first + [again.step(next(batches))[0] for _ in range(4)] == losses
    for one, other in zip(
        whole.models.parameters(), again.models.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_every_example_once_per_epoch(trained, examples):
    one = trainer(trained / "order", examples)
    order = corpus.epoch_order(examples, one.among, 32, seed=1)
    flat = np.concatenate(order)
    assert sorted(flat) == sorted(one.among)
    assert not set(flat) & set(one.held_out)
    other = np.concatenate(corpus.epoch_order(examples, one.among, 32, seed=2))
    assert not np.array_equal(flat, other)


def test_loss_is_cross_entropy_without_padding(trained, examples):
    (model,) = trainer(trained / "loss", examples).models
    chosen = np.array([3, 77, 400])
    batch = corpus.collate(examples, chosen, 0, torch.device("cpu"))
    loss, tokens, hits, overlap = train.measure(model.requires_grad_(False), batch)
    expected = right = mass = count = 0.0
    for i in chosen:
        source = examples.sources[slice(*examples.source_starts[i : i + 2])]
        target = examples.targets[slice(*examples.target_starts[i : i + 2])]
        logits = model(
            input_ids=torch.tensor(source[None]).long(),
            labels=torch.tensor(target[None]).long(),
        ).logits[0]
        gold = torch.tensor(target).long()
        expected += torch.nn.functional.cross_entropy(logits, gold, reduction="sum")
        right += int((logits.argmax(-1) == gold).sum())
        mass += logits.softmax(-1).gather(-1, gold[:, None]).sum()
        count += len(target)
    assert int(tokens) == count
    assert int(hits) == right
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(overlap) == pytest.approx(float(mass), rel=1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_muon_steps_are_orthogonal(shape):
    """All directions of a matrix move about as far, none of them uphill."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn(shape)
    optimizer = train.Muon(parameters)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    for p, old in zip(parameters, before, strict=True):
        step = (old - p.detach()) / (0.2 * max(shape) ** 0.5)
        values = torch.linalg.svdvals(step)
        assert values.min() > 0.3
        assert values.max() < 1.3
        assert (step * p.grad).sum() > 0


def test_t5_1_1_keeps_its_own_head(trained):
    """transformers 5 ties every T5: saved and loaded, the head is still another."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "target")
    model = train.new_model(
        arguments(trained / "v1.1", v1_1=True), len(tokenizer), SPECIAL
    ).eval()
    model.save_pretrained(trained / "v1.1")
    tokenizer.save_pretrained(trained / "v1.1")
    again = T5ForConditionalGeneration.from_pretrained(trained / "v1.1").eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.inference_mode():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        loaded = again(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.equal(logits, loaded)
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert logits.std() < 2
    convert.convert(trained / "v1.1", trained / "v1.1-mlx")
    session = T5Session(load(trained / "v1.1-mlx"))
    session.start([ids[0].tolist()])
    import mlx.core as mx

    ours = np.array(session.extend(mx.array(ids.numpy().astype(np.int32))))
    np.testing.assert_allclose(ours, logits.numpy(), atol=1e-4)


def test_a_sources_targets_are_held_out_together(trained):
    """Else the model is measured on sentences that it has learnt by heart."""
    tokenizer = AutoTokenizer.from_pretrained(trained / "target")
    rows = [[f"{w} {v}", t] for w in WORDS for v in WORDS for t in ("ba", "be", "bi")]
    examples = corpus.from_text(rows, tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "HELD_OUT", 20)
        held_out, among = corpus.split(examples, seed=3)
    assert len(held_out) == 60
    assert sorted([*held_out, *among]) == list(range(len(rows)))
    assert not {rows[i][0] for i in held_out} & {rows[i][0] for i in among}


def test_labels_have_no_ids_without_a_token(make):
    """T5's embedding has more rows than its tokenizer ids: targets never emit them."""
    teacher, folder, _ = make()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    used = set(corpus.used_ids(tokenizer, teacher.config.vocab_size))

    class Fewer:
        """The same, without every third of its ids."""

        def __call__(self, texts):
            return tokenizer(texts)

        def get_vocab(self):
            ids = [i for i in used if i < 90 and (i % 3 or i == 0)]
            return {str(i): i for i in ids}

    device = torch.device("cpu")
    words = ["the", "cat", "sat", "on", "a", "b", "c", "e", "t", "s"]
    sources = [f"{one} {other}" for one in words for other in words]
    examples = corpus.from_teacher(sources, teacher, Fewer(), device, max_tokens=60)
    allowed = set(Fewer().get_vocab().values())
    assert set(examples.targets.tolist()) <= allowed
    assert examples.top_ids.max() < 90
    assert examples.top_probs[~np.isin(examples.top_ids, list(allowed))].sum() == 0


def said(tmp_path: Path, *flags) -> str:
    """The one line that the script ends with."""
    command = [sys.executable, train.__file__, str(tmp_path / "pairs.tsv")]
    command += ["--output", str(tmp_path / "out"), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("train.py: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_bad_input_from_the_command_line(tmp_path):
    assert "cannot read" in said(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("a\tb\n" * 10, "1 different sources are too few"),
        ("a\tb\n\nonly one\n", "line 3"),
        ("a\t \n", "line 1"),
    ],
)
def test_bad_files(tmp_path, text, words):
    (tmp_path / "pairs.tsv").write_text(text)
    with pytest.raises(InputError, match=words):
        corpus.read_columns(tmp_path / "pairs.tsv", 2, 1)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 128}, "another run, with a different feed-forward, width"),
        ({"seed": 1}, "different seed"),
        ({"output": "file"}, "exists and is no run"),
        ({"output": "full"}, "exists and is no run"),
        ({"teacher": "nowhere", "vocabulary": None}, "no Hugging Face checkpoint"),
        ({"from": "nowhere"} | OF_THE_ORIGIN, "no Hugging Face checkpoint"),
        ({"from": "target"}, "--vocabulary is what --from has"),
        (
            {"from": "alien", "teacher": "target", "output": "new"} | OF_THE_ORIGIN,
            "different tokenizers",
        ),
        ({"teacher": "target", "vocabulary": None}, "another run"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"teacher": "target", "output": "new"}, "--vocabulary is what --teacher has"),
        (
            {"from": "target", "decoder_layers": 1, "output": "new"} | OF_THE_ORIGIN,
            "--decoder-layers is 1, but",
        ),
        ({"batch": 0}, "--batch is 0"),
        ({"seed": -1}, "--seed is -1: it has to be at least 0"),
        ({"minutes": float("nan")}, "--minutes is nan"),
    ],
    ids=str,
)
def test_refused_runs(trained, changes, words):
    """Nothing of an earlier run, or of anything else, is written over."""
    (trained / "file").touch()
    (trained / "full").mkdir(exist_ok=True)
    if changes.get("from") == "alien":
        other = AutoTokenizer.from_pretrained(trained / "target")
        other.add_tokens(["alien"])
        other.save_pretrained(trained / "alien")
        for name in ("config.json", "model.safetensors"):
            shutil.copy(trained / "target" / name, trained / "alien")
    (trained / "full/something").touch()
    before = (trained / "target/config.json").read_bytes()
    changes = dict(changes)
    output = trained / changes.pop("output", "target")
    for name in changes.keys() & {"teacher", "from"}:
        changes[name] = trained / changes[name]
    with pytest.raises(InputError, match=words):
        run(output, **changes)
    assert not (trained / "new").exists()
    assert (trained / "target/config.json").read_bytes() == before


def test_tatoeba(tmp_path, monkeypatch):
    """Every pair in its split; a held-out sentence in none but its own."""
    with zipfile.ZipFile(tmp_path / "fra-eng.zip", "w") as archive:
        rows = ["Hi.\tSalut\u202f!", "Go.\tVa.", "Go.\tPars.", "One two three.\tUn."]
        archive.writestr("fra.txt", "\n".join([*rows, "Bye\u00a0 now.\tAu revoir."]))
    (tmp_path / "dev.en.txt").write_text("Go.\n")
    (tmp_path / "test.en.txt").write_text("Bye now.\n")

    def call(*flags) -> None:
        command = ["tatoeba.py", *map(str, flags), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", command)
        tatoeba.main()

    held = ["--held-out", tmp_path / "dev.en.txt", tmp_path / "test.en.txt"]
    call(tmp_path / "fra-eng.zip", *held, "--max-words", 2)
    prefix = "translate English to French: "
    expected = {
        "train": [f"{prefix}Hi.\tSalut !"],
        "dev": [f"{prefix}Go.\tVa.", f"{prefix}Go.\tPars."],
        "test": [f"{prefix}Bye now.\tAu revoir."],
    }
    for name, lines in expected.items():
        assert (tmp_path / f"out/{name}.tsv").read_text().splitlines() == lines
    with pytest.raises(InputError, match="different names"):
        call(tmp_path / "fra-eng.zip", *held, held[1])
    with pytest.raises(InputError, match="is none of"):
        call(tmp_path / "xyz-eng.zip", *held)
    (tmp_path / "deu-eng.zip").write_text("no archive")
    with pytest.raises(InputError, match="cannot read"):
        call(tmp_path / "deu-eng.zip", *held)
