from tests.unit.router.conftest import chat_body, saying


async def test_x(front) -> None:
    async with front(saying("Hello, world")) as f:
        r = await f.client.post("/v1/chat/completions", json=chat_body())
        print(r.status_code, r.text, r.headers)
        r = await f.client.post("/v1/chat/completions", json=chat_body(stream=True, stream_options={"include_usage": True}))
        print(r.status_code, r.text, r.headers)
        r = await f.client.get("/metrics")
        print(r.text)
        for p in ("/readyz", "/health", "/livez", "/v1/models", "/v1/models/bytes", "/v1/models/x", "/nope", "/v1/chat/completions"):
            r = await f.client.get(p)
            print(r.status_code, r.text)
