"""What an operator decides about a server."""

from __future__ import annotations

import ipaddress
import os

from pydantic import Field

from sstf.config_loading import Section
from sstf.decode import DecodePolicy
from sstf.errors import ConfigError


class ServeConfig(Section):
    """`policy` None takes a good one for the drafter, `context` None the target's own, at most `USUAL_CONTEXT`."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key_env: str | None = None
    policy: DecodePolicy | None = None
    slots: int = Field(default=4, ge=1, le=256)
    queue: int = Field(default=256, ge=1)
    context: int | None = Field(default=None, ge=2)
    max_new_tokens: int | None = Field(default=None, ge=1)
    grace: float = Field(default=20.0, ge=0)

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


USUAL_CONTEXT = 4096  # memory for the keys and values of every slot is taken at the start


def read_keys(config: ServeConfig) -> tuple[str, ...]:
    """The keys that clients must send; none is needed on loopback.

    Raises:
        ConfigError: the variable holds no key, or a server that others can reach would have none.
    """
    if config.api_key_env is None:
        if not config.loopback:
            raise ConfigError(
                f"--host {config.host} lets other machines ask; name with --api-key-env the environment variable that "
                "holds the key they must send, or listen on 127.0.0.1"
            )
        return ()
    keys = tuple(key for part in os.environ.get(config.api_key_env, "").split(",") if (key := part.strip()))
    if not keys or not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError(
            f"--api-key-env {config.api_key_env}: the environment variable is not set or holds no key of plain "
            "characters; set it to a key, or to several separated by commas"
        )
    return keys
