"""What a model's generation_config.json says: where its texts end, how its makers draw, and what is not done here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxfw.core.errors import InputError
from jaxfw.core.log import say_once
from jaxfw.data.tokenizer import Tokenizer

GENERATION = "generation_config.json"
# The values with which a filter changes nothing.
NEUTRAL = {"top_k": (0,), "top_p": (1,), "min_p": (0,), "repetition_penalty": (1,)}
# What would change the text there and is not done here, with the values with which it does not.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "constraints": (), "force_words_ids": (), "penalty_alpha": (0,),
    "dola_layers": (), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "diversity_penalty": (0,), "length_penalty": (1,), "typical_p": (1,),
    "top_h": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "bad_words_ids": (), "suppress_tokens": (),
    "begin_suppress_tokens": (), "forced_bos_token_id": (), "forced_eos_token_id": (), "sequence_bias": (),
    "exponential_decay_length_penalty": (), "guidance_scale": (1,), "watermarking_config": (), "min_length": (0,),
    "min_new_tokens": (0,), "num_return_sequences": (1,), "max_time": (), "token_healing": (False,),
}  # fmt: skip


def stop_ids_of(sources: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer) -> tuple[int, ...]:
    """`eos_token_id` of the first file that has one, a number or a list; else the tokenizer's."""
    for file, source in sources.items():
        found = source.get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(id_) is int for id_ in ids):
            raise InputError(f"{file}: eos_token_id={found!r} must be a token id or a list of them.")
        if ids:
            return tuple(ids)
    return () if tokenizer.eos_id is None else (tokenizer.eos_id,)


def stop_strings_of(generation: Mapping[str, Any]) -> tuple[str, ...]:
    """`stop_strings` of generation_config.json: they say where a text ends, as `eos_token_id` does."""
    found = generation.get("stop_strings") or []
    strings = [found] if isinstance(found, str) else found
    if not isinstance(strings, list) or not all(isinstance(text, str) and text for text in strings):
        raise InputError(f"{GENERATION}: stop_strings={found!r} must be a text or a list of texts.")
    return tuple(strings)


def suggested_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """How generation_config.json says to draw, as keywords of `LM.generate`; {} where it says nothing.

    What changes nothing is left out, and without `do_sample` all but the repetition penalty.

    >>> suggested_sampling({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0})
    {'temperature': 0.6, 'top_p': 0.9}
    """
    names = (
        ("top_k", "top_p", "min_p", "repetition_penalty") if generation.get("do_sample") else ("repetition_penalty",)
    )
    found = {name: generation.get(name) for name in names}
    found = {name: value for name, value in found.items() if value is not None and value not in NEUTRAL[name]}
    if not generation.get("do_sample"):
        return found
    temperature = generation.get("temperature")
    return {"temperature": 1.0 if temperature is None else temperature} | found


def say_unfollowed(directory: Path, generation: Mapping[str, Any]) -> None:
    """Tell once what the file says and a call without keywords does not do.

    How to draw is the user's to take: the same call gives the same kind of text with every model.
    """
    path = directory / GENERATION
    suggested = ", ".join(f"{name}={value}" for name, value in suggested_sampling(generation).items())
    if suggested:
        say_once(
            f"{path} suggests {suggested}; generate() is greedy unless you pass them: generate(..., **m.suggested)."
        )
    unsupported = [
        f"{name}={generation[name]!r:.40}"
        for name, neutral in UNSUPPORTED.items()
        if generation.get(name) not in (None, [], {}, *neutral)
    ]
    if unsupported:
        say_once(f"{path} asks for {', '.join(unsupported)}, which is not done here: texts can differ.")
