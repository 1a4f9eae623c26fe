"""A text encoder for tests: random weights, and a tokenizer of a dozen words."""

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a big red cat and the small green dog".split()]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def write_tokenizer(folder, *, padding="right"):
    """Write a tokenizer of whole words that puts [CLS] and [SEP] around them."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_max_length=12,
        padding_side=padding,
    ).save_pretrained(folder)


def write_encoder(folder, model, **settings):
    """Write a model with random weights and its tokenizer, and return the folder's name."""
    model.save_pretrained(folder)
    write_tokenizer(folder, **settings)
    return str(folder)


def bert(seed=0):
    torch.manual_seed(seed)
    return transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SMALL)).eval()
