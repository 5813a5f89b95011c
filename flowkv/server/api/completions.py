"""`POST /v1/completions`."""

from starlette.requests import Request

from flowkv.errors import RequestError
from flowkv.server.answers.completions import CompletionChoice, CompletionFormat, Prompt
from flowkv.server.answers.envelope import Envelope, StreamUsage
from flowkv.server.answers.generation import GenerationResponse
from flowkv.server.api.endpoint import GENERATION_ERRORS, Endpoint
from flowkv.server.api.text_service import TextService
from flowkv.server.bodies.completions import CompletionBody, decode_completion
from flowkv.server.bodies.generation import MAX_CHOICES


class CompletionsApi:
    def __init__(self, service: TextService) -> None:
        self._service = service

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                path="/v1/completions", method="POST", handler=self.complete, body=CompletionBody,
                summary="Continue prompts given as text or token ids", is_streamed=True,
                answer=Envelope[CompletionChoice], errors=GENERATION_ERRORS,
            )
        ]  # fmt: skip

    async def complete(self, request: Request) -> GenerationResponse:
        service = self._service
        arrival_s = service.frontend.now_s()
        body = decode_completion(await service.read(request))
        service.check_model(body.model)
        prompts = body.prompts()
        if len(prompts) * body.num_choices > MAX_CHOICES:
            raise RequestError(f"the prompts times n are more than {MAX_CHOICES} choices", param="prompt")
        service.frontend.limits()  # nothing is tokenized for a cluster that is not there
        prompt_ids = await service.encode_all(prompts)
        head = service.head("cmpl-", request)
        requests = service.requests(head, body, prompt_ids, await service.binding(body.constraint))
        shape = CompletionFormat(
            head,
            StreamUsage.of(body.stream_options),
            service.tokenizer,
            await self._shown_prompts(body, prompts, prompt_ids),
            n=body.num_choices,
            logprobs=body.logprobs is not None,
            token_ids=bool(body.return_token_ids),
        )
        return service.respond(body, requests, shape, arrival_s)

    async def _shown_prompts(
        self, body: CompletionBody, prompts: list[str | list[int]], prompt_ids: list[list[int]]
    ) -> list[Prompt]:
        if not body.echo:
            return [Prompt(token_ids) for token_ids in prompt_ids]
        texts = await self._service.decode_all(prompts)
        return [Prompt(token_ids, text) for token_ids, text in zip(prompt_ids, texts, strict=True)]
