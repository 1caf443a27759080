"""Reports of faults in releases, and how a sweep of the contract shows each of them.

The sweeps know nothing of this list.  A report is caught if, under the release that has the fault,
a law fails and says what the report says; it is silent if under the other release no law says so.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timemachine.stacks import NEWEST, Stack

__all__ = ["BUGS", "Bug", "Finding", "find"]


@dataclass(frozen=True)
class Bug:
    """One report.

    Attributes:
        thread: where it was reported.
        fault: one line on what went wrong.
        law: of the contract.
        methods: shell pattern of the methods that have it.
        shows: regular expression for what the law says.
        affected: releases that have it.
        fixed: releases that have not; None where none is known.
    """

    thread: str
    fault: str
    law: str
    methods: str
    shows: str
    affected: Stack
    fixed: Stack | None


@dataclass(frozen=True)
class Finding:
    """What a sweep says of a report.

    Attributes:
        cells: methods with which the law says it.
        examples: how many were tried until it showed, at best.
        evidence: what the law said there.
        known: whether the package lists it as a known deviation.
        tried: methods with which the law was decided at all.
    """

    cells: tuple[str, ...]
    examples: int
    evidence: str
    known: bool
    tried: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"cells": list(self.cells), "examples": self.examples, "evidence": self.evidence,
                "known": self.known, "tried": self.tried}  # fmt: skip


def find(bug: Bug, sweep: Mapping[str, Mapping[str, Any]]) -> Finding:
    """The cells of a sweep that say what the report says."""
    asked = [
        cell
        for cell in sweep.values()
        if cell["law"] == bug.law and fnmatch.fnmatchcase(cell["method"], bug.methods)
    ]
    saying = [cell for cell in asked if re.search(bug.shows, _said(cell))]
    decided = [cell for cell in asked if cell["result"] != "n/a"]
    if not saying:
        return Finding((), 0, "", False, len(decided))
    first = min(saying, key=lambda cell: (cell["examples"], cell["method"] != "LORA"))
    methods = tuple(cell["method"] for cell in saying)
    known = all(cell["result"] == "known" for cell in saying)
    return Finding(methods, 0 if known else first["examples"], _said(first), known, len(decided))


def _said(cell: Mapping[str, Any]) -> str:
    """What a failed or known cell said."""
    return str(cell["reason"]) if cell["result"] == "fail" else "; ".join(cell["known"])


def _bug(
    thread: str,
    fault: str,
    law: str,
    shows: str,
    affected: str = NEWEST,
    fixed: str | None = None,
    methods: str = "*",
) -> Bug:
    sound = None if fixed is None else Stack.parse(fixed)
    return Bug(thread, fault, law, methods, shows, Stack.parse(affected), sound)


BUGS = (
    _bug("peft#1505", "a refused safe merge has changed the base already",
         "safe_merge_is_safe", "of the base is changed", "0.8.2", "0.9.0"),
    _bug("peft#1639", "loading an adapter brings back those that were put on another device",
         "stays_where_it_is", "of another adapter", "0.11.1", "0.12.0", "LO*"),
    _bug("peft#1884", "a fresh AdaLoRA adapter changes the output",
         "identity_at_initialisation", "a fresh adapter", "0.11.1", "0.12.0", "ADALORA"),
    _bug("peft#2018", "merging a tied head rewrites the embedding",
         "tied_weights", "the embedding changes too"),
    _bug("peft#2075", "converted to LoRA, an adapter goes on with twice its rank",
         "converted", "changed the configuration", "0.12.0", "0.13.0"),
    _bug("peft#2084", "of a file that fits the base's own tensors are said to be missing",
         "whole_files_accepted", r"load_adapter.*base_layer", "0.13.2", "0.14.0", "LORA"),
    _bug("peft#2090", "a mixed batch passes over a name that is no adapter's",
         "unknown_names", r"told by: model\(x", "0.13.2", "0.14.0", "LORA"),
    _bug("peft#2104", "PiSSA decomposes the weight of a Conv1D as it is stored",
         "forward", "mat1 and mat2", "0.13.2", "0.14.0", "LORA+pissa"),
    _bug("peft#2118", "from_pretrained does not say what an adapter's file lacks",
         "incomplete_files_told", "from_pretrained: the file lacks", "0.13.2", "0.14.0", "LORA"),
    _bug("peft#2144", "a module whose name ends like a chosen one is adapted too",
         "chosen_layers", "modules named in full", "0.13.0", "0.13.2", "LORA"),
    _bug("peft#2159", "a layers_pattern without layers_to_transform is ignored",
         "names_that_match_nothing", "layers_pattern", "0.13.2", "0.14.0", "LORA"),
    _bug("peft#2180", "alpha of a LoKr adapter has no effect",
         "alpha_applies", "computes what alpha", "0.13.2", "0.14.0", "LOKR"),
    _bug("peft#2195", "a key of rank_pattern hides that of alpha_pattern",
         "patterns_apply", "declared are", "0.13.2", "0.14.0", "LORA"),
    _bug("peft#2220", "an adapter saves a module that another one names",
         "own_modules_saved", "is saved whole", "0.14.0", "0.15.0"),
    _bug("peft#2254", "an adapter called like a part of its parameters is saved under wrong keys",
         "any_name", "called 'lora'", "0.14.0", "0.15.0", "LORA"),
    _bug("peft#2267", "all-linear adapts what only has the name of a linear layer",
         "ways_to_choose", "'all-linear': too many", "0.14.0", "0.15.0", "LORA"),
    _bug("peft#2287", "a mixed batch cannot be searched with beams",
         "mixed_batch", "num_beams=2", "0.14.0", "0.15.0", "LORA*"),
    _bug("peft#2334", "saved modules with similar names change places on loading",
         "save_reload", "values differ", "0.14.0", "0.15.0", "LORA"),
    _bug("peft#2419", "LoHa and LoKr: a key of rank_pattern hides that of alpha_pattern",
         "patterns_apply", "by its patterns", "0.14.0", "0.15.0", "LO[HK]*"),
    _bug("peft#2432", "IA3's shortened target_modules cannot be loaded again",
         "chosen_layers", "configuration is refused", "0.14.0", "0.15.0", "IA3"),
    _bug("peft#2433", "methods do not run on a model in half precision",
         "dtypes_kept", "the same dtype", "0.15.2", "0.16.0"),
    _bug("peft#2466", "a deleted adapter leaves its saved modules behind",
         "deleted", "is still there", "0.15.2", "0.16.0", "LORA"),
    _bug("peft#2489", "merging a LoRA bias leaves out the scaling",
         "merge_equivalence", "bias.*rounding bound", "0.15.2", "0.16.0", "LORA+lora_bias"),
    _bug("peft#2510", "attention is not called by keyword",
         "applied_once", "missing 1 required positional argument: 'x'", "0.15.2", "0.16.0", "LORA"),
    _bug("peft#2539", "an expression that fits an adapter's own parts targets them",
         "ways_to_choose", r"add_adapter.*ValueError: Target module", "0.15.2", "0.16.0"),
    _bug("peft#2550", "a combination keeps the patterns of the adapters it is made of",
         "combination", r"\[1\.0\], 'linear'\): the product in up", "0.15.2", "0.16.0", "LORA"),
    _bug("peft#2649", "an embedding is saved only if a list names it",
         "ways_to_choose", "saved with", "0.16.0", "0.17.0", "LORA+*"),
    _bug("peft#2758", "an adapter that is only added trains its saved module",
         "own_settings", "after another adapter was added", "0.17.1", "0.19.1", "LORA"),
    _bug("peft#2773", "modules called like adapters or parameters are not loaded",
         "state_round_trip", "belong nowhere", "0.17.1", "0.21.0"),
    _bug("peft#2775", "scaled to once, rsLoRA has another scaling",
         "linear_in_scaling", "the scaling times", "0.17.1", "0.18.1", "LORA+rslora"),
    _bug("peft#2825", "an embedding's own factor is left out",
         "merge_equivalence", "table", "0.17.1", "0.18.1", "TRAINABLE_TOKENS"),
    _bug("peft#2893", "an adapter that is added trains in half precision, the first one does not",
         "dtypes_kept", "added: .* first adapter", "0.18.1", "0.19.1", "LORA"),
    _bug("peft#3004", "a negative weight of a combination comes out positive",
         "combination", r"\[-1\.0\]", "0.18.1", "0.19.0"),
    _bug("peft#3067", "unloaded, the base keeps an attribute",
         "unloaded", "peft_config", "0.18.1", "0.19.1"),
    _bug("peft#3111", "a combination by singular values is scaled twice",
         "combination", r"'svd'\): the product in", "0.20.0", "0.21.0", "LORA"),
    _bug("peft#3152", "DARE does not rescale",
         "random_combinations", "always below", "0.18.1", "0.19.1"),
    _bug("peft#3165", "of fused experts A reads the outputs",
         "reads_inputs", "A of experts has .* columns", "0.19.0", "0.19.1", "LORA"),
    _bug("peft#3171", "head and embedding are tied though the model says they are not",
         "tied_weights", "not tied", "0.19.1", "0.20.0", "LORA"),
    _bug("peft#3180", "TinyLoRA's projections follow from the hash of the adapter's name",
         "seeded_initialisation", "PYTHONHASHSEED=0 and", "0.19.1", "0.20.0", "TINYLORA"),
    _bug("peft#3199", "a saved module called by keyword",
         "base_output_when_disabled", "required positional argument", "0.19.1", "0.20.0", "LORA"),
    _bug("peft#3216", "unmerging IA3 multiplies a bias once more",
         "unmerge_restoration", "bias.*can lose", "0.19.1", "0.20.0", "IA3"),
    _bug("peft#3282", "saving an adapter also saves one with a longer name",
         "saved_alone", "is saved with it", "0.19.1", "0.20.0"),
    _bug("peft#3306", "biases of the base that train are not saved",
         "trained_biases", "bias='.*', read into another model", "0.20.0", "0.21.0"),
    _bug("peft#3310", "AdaMSS draws anew what it does not save",
         "state_round_trip", "read into another model", "0.19.1", "0.20.0", "ADAMSS"),
    _bug("peft#3318", "layers_to_transform chooses experts",
         "chosen_layers", r"adapted are inner\.", "0.19.1", "0.20.0"),
    _bug("peft#3376", "settings of a deleted adapter stay",
         "name_forgotten", "still a key", "0.19.1", "0.20.0", "LORA"),
    _bug("peft#3396", "a merge in half precision replaces the factors of an embedding",
         "parameters_kept", "another object", "0.19.1", "0.20.0", "LORA"),
    _bug("peft#3427", "a grouped convolution cannot be prepared for hot swaps",
         "hot_swap", "prepare_model_for_compiled_hotswap", "0.19.1", "0.20.0", "LORA"),
    _bug("peft#3455", "unload with an adapter without saved modules at work",
         "unloaded", "unhashable", "0.20.0", "0.21.0", "LORA"),
    _bug("peft#3482", "adapters merged in turn are not those active together",
         "order_of_merges", "in turn and unmerged", "0.20.0", "0.21.0", "HIRA"),
    _bug("peft#3487", "a second AdaLoRA adapter thaws the first and is frozen",
         "requires_grad", "onto a frozen one", "0.20.0", "0.21.0", "ADALORA"),
    _bug("peft#3503", "LoRA+ trains embeddings at the usual rate",
         "learning_rates", "declared is 0.5", "0.20.0", "0.21.0", "LORA"),
    _bug("peft#3504", "deleting a merged adapter leaves it in the base",
         "frozen_weights", "delete while merged", "0.20.0", "0.21.0"),
    _bug("peft#3514", "tokens in common are mixed when merged in turn",
         "order_of_merges", "mixed without a word", "0.20.0", "0.21.0", "TRAINABLE_TOKENS"),
    _bug("peft#3534", "a second adapter that matches nothing",
         "targets_that_match_nothing", "second adapter", "0.20.0", "0.21.0"),
    _bug("peft#3559", "an adapter of a name that is taken replaces it",
         "taken_names", "of the same name was added", "0.20.0", "0.21.0"),
    _bug("peft#3580", "a second, trainable adapter thaws the first and is frozen",
         "requires_grad", r"after load_adapter\(is_trainable=True\)", "0.20.0", "0.21.0"),
    _bug("peft#3581", "a hot swap into a merged adapter does nothing",
         "isolation", "hot-swapping into a merged adapter", "0.20.0", "0.21.0"),
    _bug("peft#3582", "pattern keys that match nothing are ignored",
         "patterns_that_match_nothing", "nobody is told", "0.20.0", "0.21.0"),
    _bug("peft#3631", "loaded by transformers, what layers share is drawn anew",
         "loaded_by_transformers", "720 of 720 values differ", "0.20.0", "0.21.0"),
    _bug("peft#3761", "a combination of one adapter is another one",
         "combination", "3761"),
    _bug("peft#3774", "attention adds its output projection's product twice",
         "applied_once", "output projection twice"),
    _bug("transformers#45127", "a merged model is loaded with its head tied again",
         "merged_reload", "merged, saved and loaded again", "0.14.0", "0.20.0"),
    _bug("trl#6688", "in half precision the error grows with every merge",
         "unmerge_without_growth", "6688", "0.16.0", "0.15.2"),
)  # fmt: skip
