"""Side by side in one run: ``transformers.Trainer`` with PEFT as people write it today, and safe_lab's variants.

Every (variant, repetition) trains in a fresh process, and the variants take turns (A B C A B C ...), so that what a machine
does over time weighs on all of them alike.
"""

from safe_lab.bench.compare import Comparison
from safe_lab.bench.config import Bench, load
from safe_lab.bench.folder import claim_folder, run
from safe_lab.bench.show import print_tables, to_json

__all__ = ["Bench", "Comparison", "claim_folder", "load", "print_tables", "run", "to_json"]
