"""Sentence encoders against a plain implementation, on a small random BERT that is written to disk like a published one."""

import json
import sys
import threading
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests import helpers
from vlaflow.backbones import sentences
from vlaflow.backbones.sentences import SentenceEncoder
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.errors import CapabilityError, CheckpointError, ConfigError, SpecError
from vlaflow.policies.base import Policy
from vlaflow.spec import Observation

transformers = pytest.importorskip("transformers")

WORDS = ("open", "close", "the", "drawer", "window", "##s", "slowly")
ROUNDING = {"atol": 2e-6, "rtol": 1e-5}  # float32, sums in another order, two layers


def write_encoder(folder, seed=0, **settings):
    """The files of a published encoder: config, weights, tokenizer, and what its modules do."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: number for number, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    transformers.BertTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    torch.manual_seed(seed)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8} | settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with torch.random.fork_rng():
        return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def plainly(folder, ids):
    """BERT from its weights alone: mean of the last states, divided by its norm."""
    from safetensors.torch import load_file

    w = load_file(folder / "model.safetensors")

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    table = {part: w[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")}
    x = norm(table["word"][ids] + table["position"][: len(ids)] + table["token_type"][0], "embeddings.LayerNorm")
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        q, k, v = (
            linear(x, f"{layer}.attention.self.{part}").view(-1, 4, 8).transpose(0, 1) for part in ("query", "key", "value")
        )
        mixed = (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(0, 1).reshape(-1, 32)
        x = norm(linear(mixed, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
        inner = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
    mean = x.mean(0)
    return mean / mean.norm()


def test_an_embedding_is_the_normalised_mean_of_the_last_states(folder):
    encoder = SentenceEncoder.open(str(folder))
    found = encoder(["Open the drawers", "close"])
    expected = torch.stack([plainly(folder, [2, 5, 7, 8, 10, 3]), plainly(folder, [2, 6, 3])])
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_a_sentence_is_encoded_once_and_does_not_depend_on_its_neighbours(folder, monkeypatch):
    encoder, encoded = SentenceEncoder.open(str(folder)), []
    run = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda sentence: encoded.append(sentence) or run(sentence))
    alone = encoder(["close"])[0]
    together = encoder(["open the window slowly", "close", "close"])
    assert encoded == ["close", "open the window slowly"]
    assert torch.equal(together[1], alone)
    assert torch.equal(together[2], alone)
    monkeypatch.setattr(sentences, "REMEMBERED", 1)
    encoder(["open", "close"])
    assert len(encoder._known) == 1


def test_what_was_embedded_while_acting_can_be_learned_from(folder):
    """Tensors of the inference mode cannot."""
    encoder = SentenceEncoder.open(str(folder))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        encoder(["close"])
    weight = torch.ones(32, requires_grad=True)
    (encoder(["close"]) @ weight).sum().backward()
    assert weight.grad is not None
    assert encoder(["close"]).dtype == torch.float32


def test_threads_may_share_an_encoder(folder):
    encoder, found = SentenceEncoder.open(str(folder)), []
    said = [f"{a} the {b}" for a in ("open", "close") for b in ("drawer", "window")]
    threads = [threading.Thread(target=lambda: found.append(encoder(said))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, found[0]) for each in found)


def test_a_sentence_beyond_the_limit_is_refused(folder):
    with pytest.raises(SpecError, match="has 9 tokens, the encoder reads at most 8"):
        SentenceEncoder.open(str(folder))(["open the drawer close the window slowly"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"model_type": "mpnet"}, "type 'mpnet'; a sentence encoder must be a BERT"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "pools by cls_token"),
        ("modules.json", [{"type": "a.Transformer"}, {"type": "a.Pooling"}], "only Transformer, Pooling, Normalize"),
    ],
)
def test_other_kinds_of_encoders_are_refused(tmp_path, file, content, message):
    write_encoder(tmp_path / "bert")
    (tmp_path / "bert" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "bert" / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        SentenceEncoder.open(str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x40" + bytes(7) + b"{}"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("config.json", None),
        ("tokenizer_config.json", b'{"a": '),
    ],
)
def test_a_damaged_encoder_is_one_sentence(folder, tmp_path, file, content):
    """A copy that was cut short, most of all: the weights are by far the largest file."""
    SentenceEncoder.open(str(folder)).save(tmp_path / "bert")
    (tmp_path / "bert" / file).unlink()
    if content is not None:
        (tmp_path / "bert" / file).write_bytes(content)
    with pytest.raises(ConfigError, match=r"bert.*copy (it|the encoder's folder) again\.$") as raised:
        SentenceEncoder.open(str(tmp_path / "bert"))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_others_may_read_a_saved_encoder_as_they_may_the_policy(folder, tmp_path):
    """A policy that one user trains is served by another."""
    policy = make_policy(folder)
    policy.save_pretrained(tmp_path)
    modes = {file.relative_to(tmp_path): file.stat().st_mode for file in tmp_path.rglob("*") if file.is_file()}
    assert len(set(modes.values())) == 1, modes


def test_an_encoder_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"nobody/nothing' could not be fetched .* Give the path of its folder\."):
        SentenceEncoder.open("nobody/nothing")
    monkeypatch.setattr(sentences, "PACKAGE", "no-such-package")
    with pytest.raises(ConfigError, match=r"could not be fetched .* pip install no-such-package"):
        SentenceEncoder.open("minilm")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CapabilityError, match=r"pip install 'vlaflow\[vlm\]'"):
        SentenceEncoder.open("minilm")


def test_minilm_is_taken_from_the_package_that_contains_it(tmp_path, monkeypatch):
    write_encoder(tmp_path / "small_words/models/bert")
    (tmp_path / "small_words/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sentences, "PACKAGE", "small-words")
    assert SentenceEncoder.open("minilm").spec.dim == 32


# -- in a policy -----------------------------------------------------------------------------------------------------


def make_policy(source, seed=0):
    config = helpers.policy_config()
    config = replace(config, backbone=replace(config.backbone, text=str(source)))
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    policy = Policy.create(config, helpers.action_spec(), stats, seed)
    policy.model.eval()
    return policy


def say(words):
    seen = helpers.observation()
    return Observation(seen.images, seen.state, words)


def test_a_policy_reads_the_embedding_as_one_token(folder):
    policy = make_policy(folder)
    assert policy.config.backbone.sentence == SentenceEncoder.open(str(folder)).spec
    one, other = policy.act(say("open the drawer")), policy.act(say("close the drawer"))
    assert (one.actions != other.actions).any()
    assert (policy.act([say("close"), say("open the drawer")])[1].actions != other.actions).any()
    prefix = policy.model.backbone.embed(policy.processor(helpers.batch().observation))
    assert prefix.hidden_BPW.shape[1] == 4 + 1 + 1  # cells, sentence, state
    assert policy.config.backbone.longest_instruction is None


def test_a_checkpoint_contains_its_encoder(folder, tmp_path):
    write_encoder(tmp_path / "bert")
    policy = make_policy(tmp_path / "bert")
    policy.save_pretrained(tmp_path / "saved")
    (tmp_path / "bert").rename(tmp_path / "elsewhere")
    opened = Policy.from_pretrained(tmp_path / "saved")
    seen = say("open the window slowly")
    assert (opened.act(seen).actions == policy.act(seen).actions).all()
    assert str(tmp_path) not in (tmp_path / "saved/processor/config.json").read_text()


def test_a_checkpoint_with_another_encoder_or_none_is_refused(folder, tmp_path):
    policy = make_policy(folder)
    policy.save_pretrained(tmp_path / "saved")
    write_encoder(tmp_path / "other", seed=1)
    (tmp_path / "saved/processor/model.safetensors").write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"has fingerprint .* but the policy was trained with .* Restore"):
        Policy.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved/processor").rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="is missing \\(the sentence encoder\\)"):
        Policy.from_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match="has fingerprint"):
        replace(policy.config.backbone, text=str(tmp_path / "other")).processor()


def test_bytes_need_no_package():
    assert TinyConfig(2).packages == ()
    assert TinyConfig(2, text="minilm").packages == ("transformers",)
