"""A judge behind any server that speaks OpenAI's protocol of completions."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_peft.truthfulqa.judges.protocol import Kind, judge_prompt

_PASSING = {408, 409, 429, 500, 502, 503, 504}  # what may be well a moment later


class ServerJudge:
    """P(` yes`) from `POST {url}/completions` with one token and its log-probabilities, as the original asked GPT-3.

    vLLM, llama.cpp's server, TGI and OpenAI itself answer it. The probability is that of the likeliest token which is
    "yes" but for spaces and case, 0 where none is among those that the server returns.

    Args:
        url: up to and with `/v1`.
        model: the model's name there.
        kind: `"truth"` or `"info"`.
        api_key: sent as a bearer token where given.
        timeout: seconds to wait for an answer.
        retries: further attempts after a failure that may pass (no connection, 408, 409, 429, 5xx).
        backoff: seconds before the first further attempt, twice as many before each next one; a server's
            `Retry-After` is obeyed.
        logprobs: how many of the likeliest tokens to ask for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        kind: Kind,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        logprobs: int = 5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}.")
        self.url, self.model, self.kind, self.api_key = url.rstrip("/"), model, kind, api_key
        self.timeout, self.retries, self.backoff, self.logprobs = timeout, retries, backoff, logprobs

    def score(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return the probability of yes for each answer, `[N]` float32.

        Raises:
            ConnectionError: the server fails for good; the message says with what.
        """
        return torch.tensor([self._ask(judge_prompt(q, a, self.kind)) for q, a in zip(questions, answers, strict=True)])

    def _ask(self, prompt: str) -> float:
        request = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": self.logprobs}
        answer = self._post({**request})
        try:
            likeliest = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            verdicts = [logprob for token, logprob in likeliest.items() if token.strip().lower() == "yes"]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ConnectionError(
                f"{self.url}/completions returned no log-probabilities: the judge needs a server that gives them."
            ) from error
        return min(1.0, math.exp(max(verdicts))) if verdicts else 0.0

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url}/completions", json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                failure = f"HTTP {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code not in _PASSING:
                    break
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                failure = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                time.sleep(wait)
        raise ConnectionError(f"{self.url}/completions failed: {failure}.")


def _seconds(header: str | None) -> float:
    """Return the seconds of a `Retry-After`; one that is a date counts as none."""
    return float(header) if header is not None and header.replace(".", "", 1).isdigit() else 0.0
