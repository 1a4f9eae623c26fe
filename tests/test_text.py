"""Captions become the embeddings of their own tokens by any text encoder, and padded batches of them."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from driftmap.data.batch import Batches, Stream, ordered
from driftmap.data.encode import encode_shards
from driftmap.data.encoders import CaptionEncoder, Encoding
from driftmap.data.members import npy_bytes
from driftmap.data.reader import Sample
from driftmap.data.shards import ShardSet, ShardWriter, index_shards
from driftmap.data.text import CaptionPlace, TextDecoder
from driftmap.models.text_encoder import load_text_encoder
from driftmap.trainer.config import ConfigError
from driftmap.trainer.encode import text_encoder_of, text_fingerprint
from small_encoder import SMALL, WORDS, bert, write_encoder, write_tokenizer

TINY = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}


def of_clip(kind):
    config = transformers.CLIPTextConfig(vocab_size=len(WORDS), eos_token_id=3, **SMALL)
    if kind == "text":
        return transformers.CLIPTextModel(config)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **SMALL)
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=config.to_dict(), vision_config=vision.to_dict())
    )


FAMILIES = {
    "bert": bert,
    "clip": lambda: of_clip("both"),
    "clip text": lambda: of_clip("text"),
    "t5": lambda: transformers.T5Model(transformers.T5Config(**TINY)),
    "gpt": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=1, n_head=2)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_caption_gives_its_own_tokens_whatever_stands_beside_it(tmp_path, family):
    encoder = load_text_encoder(write_encoder(tmp_path, FAMILIES[family](), padding="left"))
    assert (encoder.width, encoder.max_tokens) == (16, 12)
    captions = ["a red cat", "", "the small green dog and a big red cat and the small green dog"]
    together = encoder(captions)
    assert [tuple(tokens.shape) for tokens in together] == [(5, 16), (2, 16), (12, 16)]
    for caption, tokens in zip(captions, together, strict=True):
        torch.testing.assert_close(encoder([caption])[0], tokens)
    assert not torch.equal(together[0][-1], encoder(["a big cat"])[0][-1])  # what comes before counts


def test_the_embedding_is_the_last_hidden_state_of_the_model(tmp_path):
    model = bert()
    encoder = load_text_encoder(write_encoder(tmp_path, model), max_tokens=4)
    (tokens,) = encoder(["a red cat and"])
    number = {word: place for place, word in enumerate(WORDS)}
    ids = torch.tensor([[number[word] for word in ("[CLS]", "a", "red", "[SEP]")]])
    torch.testing.assert_close(tokens, model(ids).last_hidden_state[0])


def test_a_pipeline_folder_is_an_encoder_too(tmp_path):
    bert().save_pretrained(tmp_path / "text_encoder")
    write_tokenizer(tmp_path / "tokenizer")
    whole = load_text_encoder(write_encoder(tmp_path / "whole", bert()))
    assert text_fingerprint(load_text_encoder(str(tmp_path))) == text_fingerprint(whole)


def test_an_unused_part_without_weights_changes_nothing(tmp_path):
    """The pooler of a BERT that was trained to fill in words is random each time it is loaded."""
    config = transformers.BertConfig(vocab_size=len(WORDS), **SMALL)
    place = write_encoder(tmp_path, transformers.BertForMaskedLM(config))
    one, other = load_text_encoder(place), load_text_encoder(place)
    assert text_fingerprint(one) == text_fingerprint(other)


def test_what_is_no_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="owner/none is no text encoder that can be loaded"):
        load_text_encoder("owner/none")
    place = write_encoder(tmp_path / "encoder", bert())
    with pytest.raises(ValueError, match="max_tokens is 13; .* takes 1 to 12 tokens"):
        load_text_encoder(place, max_tokens=13)
    pickled = tmp_path / "pickled"
    shutil.copytree(place, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(bert().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file named model.safetensors.*weights in safetensors"):
        load_text_encoder(str(pickled))
    larger = json.loads((tmp_path / "encoder" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(larger))
    with pytest.raises(ValueError, match=r"the weights of .* lack encoder\.layer\.1\..* and 15 more"):
        load_text_encoder(place)


# Captions


def sample(**members):
    return Sample("k", "s.tar", members)


def write(folder, *samples):
    with ShardWriter(folder) as writer:
        for number, members in enumerate(samples):
            writer.write(f"k{number}", members)
    return index_shards(folder)


def test_captions_stand_where_they_are_said_to(tmp_path):
    shards = write(tmp_path, {"txt": b"x", "json": b"{}"})
    assert str(CaptionPlace.of(shards)) == "txt"
    assert CaptionPlace.of(shards).read(sample(txt=" Gr\u00fcn \n".encode())) == "Gr\u00fcn"
    place = CaptionPlace.of(shards, "json:name")
    assert str(place) == "json:name"
    assert place.read(sample(json=b'{"name": "a:b"}')) == "a:b"
    assert place.read(sample(json=b'{"name": ""}')) == ""
    optional = CaptionPlace.of(shards, "json:name", optional=True)
    assert optional.read(sample(json=b'{"name": null}')) == optional.read(sample(png=b"")) == ""


def test_captions_that_are_not_there_are_named(tmp_path):
    shards = write(tmp_path, {"json": b"{}"})
    with pytest.raises(ValueError, match="has no txt and so no captions there; it has json"):
        CaptionPlace.of(shards, "txt")
    for wrong in ("json", "txt:x", "png", "json:"):
        with pytest.raises(
            ValueError, match=f"captions cannot stand in '{wrong}'; expected txt or json:FIELD"
        ):
            CaptionPlace.of(shards, wrong)
    place = CaptionPlace.of(shards)
    for members, message in [
        ({}, "there is no caption in json:caption; write one, or give --captions-optional"),
        ({"json": b'{"class": 1}'}, "there is no caption in json:caption"),
        ({"json": b'{"caption": 3}'}, "json:caption is 3; expected text"),
        ({"json": b"[1]"}, "json cannot be read .it is list, expected an object"),
        ({"json": b"{"}, "json cannot be read"),
    ]:
        with pytest.raises(ValueError, match=rf"^s\.tar: k: {message}"):
            place.read(sample(**members))
    with pytest.raises(ValueError, match=r"s\.tar: k: txt cannot be read .*utf-8"):
        CaptionPlace("txt").read(sample(txt=b"\xff"))


# Batches


@pytest.fixture
def encoded(tmp_path):
    """Return points with captions of 0, 1, ... words, and the encoder that made their embeddings."""
    encoder = load_text_encoder(write_encoder(tmp_path / "encoder", bert()), max_tokens=8)
    points = npy_bytes(np.zeros(2, np.float32))
    samples = [{"points.npy": points, "txt": " ".join(["cat"] * n).encode() or b" "} for n in range(5)]
    source = write(tmp_path / "source", *samples)
    card = {"encoder": text_fingerprint(encoder), "max_tokens": 8, "width": 16, "name": encoder.name}
    encoding = Encoding(CaptionEncoder(encoder, CaptionPlace("txt")), {"text": card})
    return encode_shards(source, tmp_path / "encoded", [encoding]), encoder


def test_batches_pad_captions_and_say_which_tokens_are_real(encoded):
    shards, encoder = encoded
    batch = next(ordered(shards.labelled_by("text"), 5))
    assert (batch["text"].shape, batch["text_mask"].shape) == ((5, 8, 16), (5, 8))
    assert batch["text_mask"].dtype == torch.bool
    assert batch["text_mask"].sum(1).tolist() == [2, 3, 4, 5, 6]
    for number, tokens in enumerate(encoder([" ".join(["cat"] * n) for n in range(5)])):
        length = len(tokens)
        assert torch.equal(batch["text"][number, :length], tokens.half())
        assert batch["text_mask"][number, :length].all()
        assert not batch["text"][number, length:].any()
    with Batches(shards.labelled_by("text"), Stream(batch_size=3, seed=0)) as batches:
        assert next(batches)["text"].shape == (3, 8, 16)


def test_embeddings_that_do_not_fit_the_card_are_named():
    decoder = TextDecoder(max_tokens=4, width=2)
    good = np.ones((3, 2), np.float16)
    assert decoder.read(sample(**{"text.npy": npy_bytes(good)})).shape == (3, 2)
    for array, message in [
        (np.ones((5, 2), np.float16), r"text\.npy is float16 \(5, 2\); the card says float \(up to 4, 2\)"),
        (np.ones((3, 3), np.float16), r"text\.npy is float16 \(3, 3\)"),
        (np.ones((3, 2), np.int64), r"text\.npy is int64"),
        (good * np.inf, r"text\.npy holds numbers that are not finite"),
    ]:
        with pytest.raises(ValueError, match=rf"^s\.tar: k: {message}"):
            decoder([sample(**{"text.npy": npy_bytes(array)})])
    with pytest.raises(ValueError, match=r"^s\.tar: k: there is no text\.npy"):
        decoder([sample(txt=b"a")])


def test_a_set_is_used_with_its_own_text_encoder_alone(encoded, tmp_path):
    shards, encoder = encoded
    same = text_encoder_of(shards)
    assert same.max_tokens == 8
    assert torch.equal(same(["a red cat"])[0], encoder(["a red cat"])[0])
    other = write_encoder(tmp_path / "other", bert(seed=1))
    with pytest.raises(
        ConfigError, match="was encoded by the text encoder .* but .*other is .*; give the right"
    ):
        text_encoder_of(shards, other)
    shutil.copytree(encoder.name, tmp_path / "renamed")
    text = (tmp_path / "renamed" / "tokenizer.json").read_text().replace('"cat"', '"cow"')
    (tmp_path / "renamed" / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="was encoded by the text encoder"):
        text_encoder_of(shards, str(tmp_path / "renamed"))
    with pytest.raises(ConfigError, match="holds no embeddings of captions"):
        text_encoder_of(ShardSet.open(tmp_path / "source"))
