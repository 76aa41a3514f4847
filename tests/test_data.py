from __future__ import annotations

import json
import logging

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM
from usaf_ext.data import BatchOrder, PackedDataset, read_documents
from usaf_ext.evaluation import evaluate


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def lines(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_documents_of_both_kinds(tmp_path, tokenizer):
    text = tmp_path / "a.txt"
    text.write_text("one\n\ntwo", encoding="utf-8")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = lines(tmp_path / "b.jsonl", {"text": "three é"}, "", {"messages": chat})
    documents = read_documents([text, records], tokenizer)
    assert [tokenizer.decode(d) for d in documents] == ["one\n\ntwo", "three é", "<user>hi\n<assistant>ho\n"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object with either"),
        ({}, "expected an object with either"),
        ({"text": "x", "messages": []}, "expected an object with either"),
        ({"text": 3}, "'text' to be a string"),
        ({"messages": []}, "'messages' to be a list"),
        ({"messages": ["x"]}, "'messages' to be a list"),
    ],
)
def test_broken_records_name_file_and_line(tmp_path, tokenizer, record, message):
    path = lines(tmp_path / "broken.jsonl", {"text": "fine"}, record)
    with pytest.raises(ValueError, match=rf"broken\.jsonl, line 2: .*{message}"):
        read_documents([path], tokenizer)


def test_messages_without_a_chat_template_or_refused_by_it(tmp_path):
    path = lines(tmp_path / "chat.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"line 1: .*roles must alternate"):
        read_documents([path], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"line 1: 'messages' need a tokenizer with a chat template"):
        read_documents([path], tokenizer)


def test_other_files_are_refused(tmp_path, tokenizer):
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "empty.txt").write_text("")
    for names, error, message in (
        (["x.csv"], ValueError, "x.csv: expected a .txt or .jsonl file"),
        (["latin.txt"], ValueError, "latin.txt: not UTF-8"),
        (["empty.txt"], ValueError, "no text at all"),
        (["absent.txt"], FileNotFoundError, "absent.txt: no such file"),
        ([], ValueError, "at least one file"),
    ):
        with pytest.raises(error, match=message):
            read_documents([tmp_path / name for name in names], tokenizer)
    with pytest.raises(TypeError, match="expected a list of files"):
        read_documents(str(tmp_path / "x.csv"), tokenizer)


def test_packing_keeps_every_token_in_order(caplog):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    stream = [1, 2, 3, 0, 4, 0, 5, 6, 7, 8, 9, 0]
    with caplog.at_level(logging.INFO, logger="usaf_ext.data"):
        data = PackedDataset(documents, 5, eos_token_id=0)
    assert [s.tolist() for s in data] == [stream[:5], stream[5:10]]
    assert (data.num_tokens, data.num_left_out) == (10, 2)
    assert "2 tokens at the end" in caplog.text
    kept = PackedDataset(documents, 5, eos_token_id=0, keep_tail=True)
    assert torch.cat(list(kept)).tolist() == stream
    assert kept.num_left_out == 0
    without_eos = PackedDataset(documents, 3, eos_token_id=None)
    assert torch.cat(list(without_eos)).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    one_left = PackedDataset(documents, 11, eos_token_id=0, keep_tail=True)
    assert (len(one_left), one_left.num_left_out) == (1, 1)  # a lone token predicts nothing


def test_eos_follows_each_document_of_a_file(tmp_path, tokenizer):
    path = lines(tmp_path / "d.jsonl", {"text": "ab"}, {"text": "c"})
    data = PackedDataset.from_files([path], tokenizer, 5)
    assert tokenizer.decode(data[0]) == "ab<eos>c<eos>"
    assert tiny_tokenizer(eos=False).eos_token_id is None
    plain = PackedDataset.from_files([path], tiny_tokenizer(eos=False), 3)
    assert tokenizer.decode(plain[0]) == "abc"


def test_too_little_data_and_bad_length():
    with pytest.raises(ValueError, match="the data has 4 tokens; expected at least 5"):
        PackedDataset([[1, 2, 3]], 5, eos_token_id=0)
    with pytest.raises(ValueError, match="seq_len: expected at least 2"):
        PackedDataset([[1, 2, 3]], 1, eos_token_id=0)


@pytest.mark.parametrize(("num_sequences", "batch_size"), [(10, 3), (7, 7), (3, 8), (1, 1)])
def test_every_epoch_gives_each_sequence_once(num_sequences, batch_size):
    order = BatchOrder(num_sequences, batch_size, seed=5)
    drawn = [i for _ in range(4 * num_sequences) for i in next(order)]
    epochs = [drawn[i : i + num_sequences] for i in range(0, len(drawn) - num_sequences + 1, num_sequences)]
    assert all(sorted(epoch) == list(range(num_sequences)) for epoch in epochs)
    if num_sequences == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_depends_on_the_seed_alone_and_resumes():
    a, b, other = (BatchOrder(50, 4, seed=seed) for seed in (3, 3, 4))
    batches = [next(a) for _ in range(40)]
    assert batches == [next(b) for _ in range(40)]
    assert batches != [next(other) for _ in range(40)]
    for cut in (0, 7, 12, 13, 25):
        first = BatchOrder(50, 4, seed=3)
        for _ in range(cut):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        resumed = BatchOrder(50, 4, seed=99)
        resumed.load_state_dict(state)
        assert [next(resumed) for _ in range(40 - cut)] == batches[cut:]


def test_bad_orders():
    for arguments, error in (((0, 1, 0), ValueError), ((1, 0, 0), ValueError), ((1, 1, -1), ValueError)):
        with pytest.raises(error, match="expected at least"):
            BatchOrder(*arguments)
    with pytest.raises(TypeError, match="batch_size: expected an int"):
        BatchOrder(3, 1.5, 0)
    order = BatchOrder(5, 2, 0)
    for broken in ({}, BatchOrder(6, 2, 0).state_dict(), order.state_dict() | {"position": 6}):
        with pytest.raises(ValueError, match="state"):
            order.load_state_dict(broken)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return AutoModelForCausalLM.from_config(tiny_config(attention_dropout=0.5), dtype=torch.float32)


def test_evaluation_is_the_mean_over_all_tokens(model):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 260, (n,), generator=generator) for n in (16, 16, 16, 9)]
    total, count = 0.0, 0
    model.eval()
    for sequence in sequences:
        with torch.no_grad():
            logits = model(input_ids=sequence[None]).logits[0]
        total += float(F.cross_entropy(logits[:-1].double(), sequence[1:], reduction="sum"))
        count += len(sequence) - 1
    model.train()
    model.lm_head.eval()
    for batch_size in (1, 2, 5):
        assert evaluate(model, sequences, batch_size) == pytest.approx(total / count, rel=1e-5)
    assert model.training
    assert not model.lm_head.training


def test_one_forward_for_each_batch(model):
    calls = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    evaluate(model, PackedDataset([list(range(70))], 10, eos_token_id=None), 3)
    handle.remove()
    assert calls == [False] * 3


def test_bad_evaluation_leaves_the_mode(model):
    model.train()
    with pytest.raises(ValueError, match="at least one"):
        evaluate(model, [], 2)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(model, [torch.arange(4)], 0)
    with pytest.raises(IndexError):
        evaluate(model, [torch.tensor([1, 9999])], 1)
    assert model.training
