"""`POST /v1/completions`."""

from starlette.requests import Request

from flowkv.errors import RequestError
from flowkv.server.completion_body import CompletionBody, decode_completion
from flowkv.server.completion_format import CompletionChoice, CompletionFormat, Prompt
from flowkv.server.endpoint import GENERATION_ERRORS, Endpoint
from flowkv.server.generation import GenerationResponse
from flowkv.server.protocol import MAX_CHOICES
from flowkv.server.response import Envelope, StreamUsage
from flowkv.server.text_service import TextService


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
        prompt_ids = [await service.encode(part) if isinstance(part, str) else part for part in prompts]
        head = service.head("cmpl-", request)
        requests = service.requests(head, body, prompt_ids, await service.binding(body.constraint))
        shape = CompletionFormat(
            head,
            StreamUsage.of(body.stream_options),
            service.tokenizer,
            [self._prompt(body, part, ids) for part, ids in zip(prompts, prompt_ids, strict=True)],
            n=body.num_choices,
            logprobs=body.logprobs is not None,
            token_ids=bool(body.return_token_ids),
        )
        return service.respond(body, requests, shape, arrival_s)

    def _prompt(self, body: CompletionBody, part: str | list[int], token_ids: list[int]) -> Prompt:
        if not body.echo:
            return Prompt(token_ids)
        return Prompt(token_ids, part if isinstance(part, str) else self._service.tokenizer.decode(part))
