"""The adapter that comes out: PEFT's format, and what one needs to use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from safe_lab import checkpoint
from safe_lab.adapters import save_adapter
from safe_lab.run_folder import RunFolder

ADAPTER_CARD = """# Adapter trained with safe_lab

On the base model {path}; in plain PEFT, where BASE is that model (a hub id or folder) and ADAPTER this folder:

```python
import json
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
base = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels={num_labels}, pad_token_id=tokenizer.pad_token_id)
model = PeftModel.from_pretrained(base, ADAPTER).eval()
labels = json.load(open(f"{{ADAPTER}}/labels.json"))  # names by id; empty for regression
```

That transformers reports the base's classifier as newly initialized is as it should be: the trained one is in the adapter.
"""


def export(
    model: Any,
    folder: RunFolder,
    tokenizer: Any,
    path: str,
    labels: Sequence[str],
    initial: Mapping[str, Tensor] | None,
) -> None:
    """Write ``adapter/`` whole or not at all: adapters and head in PEFT's format, tokenizer, names of the labels."""
    unfinished = folder.path / ".unfinished-adapter"
    shutil.rmtree(unfinished, ignore_errors=True)
    save_adapter(model, unfinished, initial=initial)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "labels.json").write_text(json.dumps(list(labels), ensure_ascii=False))
    (unfinished / "README.md").write_text(ADAPTER_CARD.format(path=path, num_labels=len(labels) or 1))
    checkpoint.sync(unfinished)
    shutil.rmtree(folder.adapter, ignore_errors=True)
    unfinished.rename(folder.adapter)
