"""A running server, as its operators reach it: over HTTP, with their key where it asks for one."""

import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from flowkv.errors import ConfigError
from flowkv.server.access.doors import ADMIN_KEY_VARIABLE
from flowkv.server.records.cluster_view import ClusterView

_TIMEOUT_S = 5.0

T = TypeVar("T")


class Remote:
    """The key is that of FLOWKV_ADMIN_KEY. ConfigError from each call that is not answered, or not as FlowKV does."""

    def __init__(self, url: str, environ: Mapping[str, str] = os.environ) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        key = environ.get(ADMIN_KEY_VARIABLE)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key.strip()}"}

    def view(self) -> ClusterView:
        return self._call("GET", "/cluster", ClusterView)

    def post(self, path: str, answer: type[T], query: Sequence[tuple[str, str]] = ()) -> T:
        return self._call("POST", path + (f"?{urllib.parse.urlencode(query)}" if query else ""), answer)

    def _call(self, method: str, path: str, answer: type[T]) -> T:
        try:
            request = urllib.request.Request(self.url + path, method=method, headers=self._headers)
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
                return msgspec.json.decode(response.read(), type=answer)
        except urllib.error.HTTPError as error:
            raise ConfigError(self._refusal(error)) from error
        except (http.client.HTTPException, msgspec.DecodeError) as error:
            raise ConfigError(f"what answers at {self.url} is no FlowKV: {error}") from error
        except urllib.error.URLError as error:
            raise ConfigError(f"nothing answers at {self.url}: {error.reason}") from error
        except OSError as error:
            raise ConfigError(f"nothing answers at {self.url}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self.url} is no URL: {error}") from error

    def _refusal(self, error: urllib.error.HTTPError) -> str:
        """What the server says; where it says nothing that a FlowKV would, that."""
        with error:
            try:
                said = msgspec.json.decode(error.read(), type=dict[str, dict[str, object]])["error"]["message"]
            except (msgspec.DecodeError, KeyError):
                return f"what answers at {self.url} is no FlowKV: {error}"
        return f"{self.url}: {said}"
