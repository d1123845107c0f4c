"""The tokens of a call that an edit touches.

A tuner layer sees only `x [B, T, ·]`. Rules on that shape ("one token, so we are decoding") break with cached
prefixes, chunked prefill and `use_cache=False`. So each tracked model carries one `Positions` object: a forward
pre-hook reads that call's attention mask, cache and position ids, and layers ask it for the mask of their policy.
What is known of a call belongs to the thread (or asyncio task) that makes it, so that several may call one model at a
time; the object belongs to the model and is copied with it. A policy is a selection in the language of
`lightning_peft.tokens`, such as `"answer"` or `"generated[0:5]"`.

`start [B]` is the position id of the token whose output is the first to be edited: the last prompt token, since its
output predicts the first answer token. It comes from the first of these that is known:

1. an explicit context, `answering(model, start=...)` or `answering(model, mask=...)` (scorers);
2. the batch's `prompt_end`, set by the callbacks for the length of a step;
3. the call's `labels` (the first that is not -100, minus one), else the batch's, for calls of their shape `[B, T]`;
4. `generate` on the tracked model (real prompt length minus one, fixed once per call); it reads prompts, of which the
   batch's labels say nothing;
5. a call without a cached past: plain text, where every position is an answer position.

The prompt of an encoder-decoder is in its encoder, whose tokens a start counts, and all tokens of its decoder are the
answer, the first being the last of its prompt.

The fifth is right for cross-entropy and KL on texts, and `plain_text(model)` says that it is meant. For the scorer of
somebody else, which puts prompt and answer into one call, it is most often wrong; so without `plain_text` a
`PlainTextWarning` says, once a process, that every token is edited. A call with a past and none of these is an error:
where its answer began cannot be known.
"""

from lightning_peft.positions.answers import answering, answering_batch, calling, note_batch, plain_text
from lightning_peft.positions.policies import POLICIES, PlainTextWarning, Policy, PositionsError, check_policy
from lightning_peft.positions.tracking import Positions, track, tracked, tracking, untrack

__all__ = [
    "POLICIES",
    "PlainTextWarning",
    "Policy",
    "Positions",
    "PositionsError",
    "answering",
    "answering_batch",
    "calling",
    "check_policy",
    "note_batch",
    "plain_text",
    "track",
    "tracked",
    "tracking",
    "untrack",
]
