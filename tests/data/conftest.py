"""A tiny tokenizer and the built-in data set, built once."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from safe_lab.data.docstrings import load_docstrings


@pytest.fixture(scope="session")
def tokenizer():
    """Splits at white space; [CLS] text [SEP] or [CLS] text [SEP] pair [SEP]; knows the words w0 to w49."""
    vocabulary = {
        name: index for index, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(50))])
    }
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def docstrings():
    """The built-in data set."""
    return load_docstrings()
