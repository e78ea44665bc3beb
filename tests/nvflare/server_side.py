"""What stands in for NVFlare's server where a component is tested without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import AppConstants

import fedavg_core as fc
from nvflare_adapter import global_model


@dataclass(frozen=True)
class NamedClient:
    name: str


@dataclass
class Server:
    """An engine, and the contexts that it gives."""

    folder: Path
    clients: list[str] = field(default_factory=lambda: ["site-10", "site-2", "site-1"])
    components: dict[str, Any] = field(default_factory=dict)
    fired: list[tuple[str, FLContext]] = field(default_factory=list)

    def get_clients(self) -> list[NamedClient]:
        return [NamedClient(name) for name in self.clients]

    def fire_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.fired.append((event_type, fl_ctx))
        for component in self.components.values():
            if isinstance(component, FLComponent):
                component.handle_event(event_type, fl_ctx)

    def get_component(self, component_id: str) -> Any:
        return self.components.get(component_id)

    def get_workspace(self) -> Workspace:
        for name in ("startup", "local"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        return Workspace(str(self.folder), site_name="server")

    def context(self, model: fc.Params | None = None, round: int = 0, rounds: int = 5) -> FLContext:
        fl_ctx = FLContextManager(self, "server", "simulate_job").new_context()
        held = global_model.learnable(model or {})
        for key, value in (
            (AppConstants.GLOBAL_MODEL, held),
            (AppConstants.CURRENT_ROUND, round),
            (AppConstants.NUM_ROUNDS, rounds),
        ):
            fl_ctx.set_prop(key, value, private=True, sticky=False)
        return fl_ctx


def result(
    params: Any,
    contributor: str | None = "site-1",
    round: Any = 0,
    kind: str = "WEIGHTS",
    weight: Any = 1,
    metrics: Any = None,
) -> Shareable:
    """A client's result as it reaches the server."""
    meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: weight}
    if metrics is not None:
        meta[MetaKey.INITIAL_METRICS] = metrics
    message = DXO(kind, data=params, meta=meta).to_shareable()
    if contributor is not None:
        message.set_peer_props({ReservedKey.IDENTITY_NAME: contributor})
    if round is not None:
        message.add_cookie(AppConstants.CONTRIBUTION_ROUND, round)
    return message
