"""What users of OpenAI's Python client do, against a server: python openai_client.py URL KEY."""

import sys

import openai

url, key = sys.argv[1:]
client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
messages = [{"role": "system", "content": "abc"}, {"role": "user", "content": [{"type": "text", "text": "xyz"}]}]

assert [model.id for model in client.models.list()] == ["tiny"]
assert client.models.retrieve("tiny").object == "model"

# A whole answer, and the same one streamed.
ask = dict(model="tiny", messages=messages, seed=3, max_completion_tokens=40)
whole = client.chat.completions.create(**ask)
choice = whole.choices[0]
assert whole.object == "chat.completion" and choice.message.role == "assistant", whole
assert choice.finish_reason in ("stop", "length") and choice.message.content, whole
assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole
assert whole.usage.prompt_tokens_details.cached_tokens >= 0, whole
assert whole.usage.completion_tokens_details.rejected_prediction_tokens >= 0, whole
assert whole.seed == 3, whole

chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and not chunks[-1].choices, chunks[-1]

# Samples, extensions, log-probabilities.
many = client.chat.completions.create(
    **ask, n=3, stop=["\n\n"], logprobs=True, top_logprobs=2, extra_body={"top_k": 50, "min_p": 0.01, "ignore_eos": True}
)
assert [choice.index for choice in many.choices] == [0, 1, 2] and all(c.logprobs for c in many.choices), many
texts = {choice.message.content for choice in many.choices}
assert len(texts) == 3, texts
for token in many.choices[0].logprobs.content:
    assert token.logprob <= 0 and bytes(token.bytes).decode(errors="replace") == token.token, token
    assert len(token.top_logprobs) == 2, token

# Completions.
both = client.completions.create(model="tiny", prompt=["abc", "xyz"], seed=1, max_tokens=5, logprobs=2)
assert [choice.index for choice in both.choices] == [0, 1], both
assert all(len(c.logprobs.tokens) == len(c.logprobs.top_logprobs) for c in both.choices), both
text = "".join(c.choices[0].text for c in client.completions.create(model="tiny", prompt="abc", seed=1, max_tokens=5, stream=True))
assert text == both.choices[0].text, (text, both)


def refused(kind, ask):
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"no {kind}")


# Errors are those that the client knows.
error = refused(openai.NotFoundError, lambda: client.chat.completions.create(**{**ask, "model": "other"}))
assert error.code == "model_not_found" and error.param == "model", error
error = refused(openai.BadRequestError, lambda: client.chat.completions.create(**ask, temperature=-1))
assert error.param == "temperature" and "-1" in error.message, error
stranger = client.with_options(api_key="wrong")
refused(openai.AuthenticationError, stranger.models.list)

# Whoever stops reading may go on with something else.
with client.chat.completions.create(**{**ask, "max_completion_tokens": 400}, stream=True) as stream:
    next(iter(stream))
client.chat.completions.create(**ask)
print("all understood")
