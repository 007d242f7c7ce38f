"""A record of a results file -> completions, in the shapes that services and engines write.

OpenAI chat and completions (also vLLM, Mistral, Azure), OpenAI Responses, Anthropic, Gemini,
Bedrock (a model's own message, or Converse's, under `modelOutput`), tool calls, and rows of an id
and a text as Ray Data, Spark (ai_query) or Snowflake (names in capitals) write them. Several
choices of one record are its samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slgr_jax.teacher.collect import thoughts
from slgr_jax.teacher.collect.completions import Completion, answer_tokens
from slgr_jax.teacher.collect.refusals import Refused

_MOST_TEXT = 100_000  # characters of an answer that are read
_ID_KEYS = ("custom_id", "key", "recordId", "record_id", "custom_identifier")
TEXT_KEYS = ("text", "generated_text", "completion", "output_text", "output", "answer", "content")
# Where a row has its text, or a list or an object of one.
_ROW_KEYS = (*TEXT_KEYS, "outputs", "response", "result")
_ENVELOPE_KEYS = frozenset(
    {*TEXT_KEYS, "choices", "candidates", "promptFeedback", "body", "message", "status_code"}
)
_CUT = frozenset(
    {"length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "model_length", "incomplete"}
)
_BLOCKED = frozenset(
    {"content_filter", "refusal", "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"}
)


class _Choice(NamedTuple):
    """One answer of a record: its text, why it ended, what it said instead, its tokens."""

    text: Any
    finish: str
    refusal: str = ""
    logprobs: Any = None


def read_line(line: bytes) -> list[Completion | Refused]:
    """What one record says: a completion or a refusal for each of its choices, at least one."""
    try:
        raw = json.loads(line.decode("utf-8-sig"))  # a file may begin with a byte order mark
    except (ValueError, RecursionError) as error:
        begins = line[:60].decode("utf-8", "replace").strip()
        return [Refused("", "not JSON", f"{str(error)[:120]}; begins {begins!r}")]
    if not isinstance(raw, dict):
        return [Refused("", "not an object", f"{type(raw).__name__} {str(raw)[:60]!r}")]
    raw = {key.lower() if key.isupper() else key: value for key, value in raw.items()}
    custom_id = _custom_id(raw)
    if custom_id is None:
        told = [f"{key} ({type(raw[key]).__name__})" for key in list(raw)[:6]]
        return [Refused("", "no custom_id", f"keys {', '.join(told)}")]
    # Ray Data writes the second one for a row that failed, beside an empty text.
    if failed := raw.get("error") or raw.get("__inference_error__"):
        return [Refused(custom_id, "error", _message(failed))]

    body = _body(raw)
    if isinstance(body, Refused):
        return [body._replace(custom_id=custom_id)]
    choices = _choices(body)
    if not choices:
        return [Refused(custom_id, "no choices", f"keys {', '.join(map(str, list(body)[:6]))}")]
    usage = _usage(body)
    return [
        _completion(custom_id, choice, usage if sample == 0 else (None, None), sample)
        for sample, choice in enumerate(choices)
    ]


def _custom_id(raw: Mapping[str, Any]) -> str | None:
    metadata = raw.get("metadata")
    for held in (raw, metadata if isinstance(metadata, dict) else {}):
        for key in _ID_KEYS:
            if isinstance(held.get(key), str) and held[key]:
                return str(held[key])
    return None


def _body(raw: Mapping[str, Any]) -> dict[str, Any] | Refused:
    """The service's own answer in a record."""
    for key in ("response", "result", "modelOutput"):
        response = _object(raw.get(key))
        if response is not None:
            if isinstance(raw[key], str) and not _ENVELOPE_KEYS & response.keys():
                return {**raw, "text": raw[key]}  # an answer that is itself JSON
            break
    else:
        if _row_texts(raw):
            return dict(raw)
        if told := _row_error(raw):
            return Refused("", "error", told)
        response = raw.get("response")
        keys = f"keys {', '.join(map(str, list(raw)[:6]))}"
        return Refused("", "no response", keys if response is None else str(response)[:200])

    if response.get("type") in ("errored", "canceled", "expired"):  # Anthropic
        return Refused("", "error", _message(response.get("error") or response["type"]))
    body = next(
        (held for key in ("body", "message") if (held := _object(response.get(key))) is not None),
        response if "body" not in response else None,
    )
    if body is None:
        return Refused("", "no response", str(response.get("body"))[:200])
    status = response.get("status_code", 200)
    if status != 200 or body.get("error"):
        return Refused("", "error", f"status {status}: {_message(body.get('error', ''))}")
    if body.get("errorMessage"):
        return Refused("", "error", _message(body["errorMessage"]))
    return body


def _row_texts(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row: under one key a text, texts, or objects with a text each."""
    for key in _ROW_KEYS:
        held = row.get(key)
        parts = held if isinstance(held, list) else [held]
        texts = [_row_texts(part) if isinstance(part, dict) else [part] for part in parts]
        flat = [text for some in texts for text in some if isinstance(text, str)]
        if flat and len(flat) == len(parts):
            return flat
    return []


def _row_error(row: Mapping[str, Any]) -> str:
    """What a row says of its failure where it has a text else: ai_query's {"error": ...}."""
    for held in (row.get(key) for key in _ROW_KEYS):
        if isinstance(held, dict) and (error := held.get("error") or held.get("errorMessage")):
            return _message(error)
    return ""


def _object(value: Any) -> dict[str, Any] | None:
    """An object, also as JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _message(error: Any) -> str:
    for _ in range(3):  # {"error": {"error": {"message": ...}}}
        if isinstance(error, dict):
            error = error.get("message") or error.get("error") or error.get("code") or error
    return str(error)[:200]


# --- the choices of each service ---------------------------------------------------------------


def _choices(body: Mapping[str, Any]) -> list[_Choice]:
    if isinstance(body.get("choices"), list):
        return [_chat(choice) for choice in body["choices"] if isinstance(choice, dict)]
    if isinstance(body.get("output"), list):
        return [_responses(body)]
    if isinstance(body.get("candidates"), list):
        return [_gemini(choice) for choice in body["candidates"] if isinstance(choice, dict)]
    if isinstance(body.get("promptFeedback"), dict):  # Gemini, blocked
        return [_Choice(None, "", str(body["promptFeedback"].get("blockReason", "blocked")))]
    if isinstance(body.get("content"), list | str):
        return [_anthropic(body)]
    held = body.get("output")
    if isinstance(held, dict) and isinstance(held.get("message"), dict):  # Bedrock's Converse
        return [_anthropic({**held["message"], "stop_reason": body.get("stopReason")})]
    ends = ("finish_reason", "stop_reason", "done_reason")
    finish = next((str(body[key]) for key in ends if body.get(key)), "")
    return [_Choice(text, finish) for text in _row_texts(body)]


def _chat(choice: Mapping[str, Any]) -> _Choice:
    """OpenAI: {"message": {"content", "refusal", "tool_calls"}, "finish_reason", "logprobs"}."""
    message = choice.get("message")
    finish = str(choice.get("finish_reason"))
    if not isinstance(message, dict):
        return _Choice(choice.get("text"), finish, logprobs=choice.get("logprobs"))
    text = _parts(message.get("content"))
    if not text:
        calls = message.get("tool_calls")
        calls = calls if isinstance(calls, list) else []
        functions = [call.get("function") for call in calls if isinstance(call, dict)]
        functions.append(message.get("function_call"))
        told = [_arguments(held, "arguments") for held in functions if isinstance(held, dict)]
        text = "\n".join(told) or text
    return _Choice(text, finish, str(message.get("refusal") or ""), choice.get("logprobs"))


def _responses(body: Mapping[str, Any]) -> _Choice:
    """OpenAI Responses: messages and function calls among the output; reasoning is left out."""
    texts, refusal, logprobs = [], "", None
    for item in body["output"]:
        if not isinstance(item, dict):
            continue
        if item.get("type") == "function_call":
            texts.append(_arguments(item, "arguments"))
        for part in item.get("content") or [] if item.get("type") == "message" else []:
            if isinstance(part, dict):
                refusal = refusal or str(part.get("refusal") or "")
                texts.append(_parts([part]) or "")
                logprobs = logprobs or part.get("logprobs")
    details = body.get("incomplete_details")
    finish = str(details.get("reason")) if isinstance(details, dict) else str(body.get("status"))
    return _Choice("".join(texts), finish, refusal, {"content": logprobs} if logprobs else None)


def _anthropic(body: Mapping[str, Any]) -> _Choice:
    """Anthropic: a list of content, text and tool_use; thinking is left out."""
    content = body["content"]
    texts = [_parts(content) or ""]
    if isinstance(content, list):
        uses = [
            part for part in content if isinstance(part, dict) and part.get("type") == "tool_use"
        ]
        texts += [_arguments(part, "input") for part in uses]
    return _Choice("\n".join(filter(None, texts)), str(body.get("stop_reason")))


def _gemini(choice: Mapping[str, Any]) -> _Choice:
    """Gemini: {"content": {"parts": [{"text"}]}, "finishReason"}; thoughts are left out."""
    content = choice.get("content")
    parts = content.get("parts") if isinstance(content, dict) else None
    parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    calls = [part["functionCall"] for part in parts if isinstance(part.get("functionCall"), dict)]
    text = _parts([part for part in parts if not part.get("thought")])
    text = text or "\n".join(_arguments(call, "args") for call in calls)
    return _Choice(text, str(choice.get("finishReason")))


def _parts(content: Any) -> str | None:
    """The text of a content: itself, or of its parts that are text."""
    if isinstance(content, list):
        parts = [
            part.get("text")
            for part in content
            if isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
        ]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _arguments(call: Mapping[str, Any], key: str) -> str:
    held = call.get(key)
    return held if isinstance(held, str) else json.dumps(held) if held is not None else ""


# --- one choice --------------------------------------------------------------------------------


def _completion(
    custom_id: str, choice: _Choice, usage: tuple[int | None, int | None], sample: int
) -> Completion | Refused:
    if not choice.text and (choice.refusal or choice.finish in _BLOCKED):
        return Refused(custom_id, "refusal", (choice.refusal or choice.finish)[:200])
    if not isinstance(choice.text, str):
        return Refused(custom_id, "no text", f"{type(choice.text).__name__}, {choice.finish}"[:80])
    text = thoughts.final_text(choice.text[:_MOST_TEXT])
    if not text:
        thought = "only thoughts, " if choice.text.strip() else ""
        return Refused(custom_id, "empty answer", f"{thought}ended by {choice.finish}"[:80])
    tokens = _tokens(choice.logprobs)
    return Completion(
        custom_id=custom_id,
        text=text,
        tokens=answer_tokens(tokens, text) if text != choice.text.strip() else tokens,
        cut=choice.finish in _CUT,
        prompt_tokens=usage[0],
        completion_tokens=usage[1],
        sample=sample,
    )


def _usage(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(prompt tokens, answer tokens) under each service's names."""
    used = body.get("usage") or body.get("usageMetadata")
    if not isinstance(used, dict):
        return None, None
    asked = ("prompt_tokens", "input_tokens", "promptTokenCount")
    told = ("completion_tokens", "output_tokens", "candidatesTokenCount")
    prompt, answer = (
        next((count for key in keys if (count := _count(used.get(key))) is not None), None)
        for keys in (asked, told)
    )
    thought = _count(used.get("thoughtsTokenCount"))
    return prompt, answer + thought if answer is not None and thought else answer


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None


def _tokens(logprobs: Any) -> list[tuple[str, dict[str, float]]]:
    """Both layouts: chat (`content`, a list of objects) and completions (parallel lists)."""
    if not isinstance(logprobs, dict):
        return []
    content = logprobs.get("content")
    listed: list[tuple[str, dict[str, float]]] = []
    if isinstance(content, list):
        for entry in content:
            if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
                break
            top = entry.get("top_logprobs")
            entries = [entry, *(top if isinstance(top, list) else [])]
            pairs = [(x.get("token"), x.get("logprob")) for x in entries if isinstance(x, dict)]
            listed.append((entry["token"], _masses(pairs)))
        return listed
    tokens, tops = logprobs.get("tokens"), logprobs.get("top_logprobs")
    if isinstance(tokens, list) and isinstance(tops, list):
        for token, top in zip(tokens, tops, strict=False):
            if not isinstance(token, str) or not isinstance(top, dict):
                break
            listed.append((token, _masses(list(top.items()))))
    return listed


def _masses(pairs: Sequence[tuple[Any, Any]]) -> dict[str, float]:
    return {
        token: float(value)
        for token, value in pairs
        if isinstance(token, str)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and not math.isnan(value)
        and value <= 0
    }
