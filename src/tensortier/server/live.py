"""What loaded models are doing right now, as figures for the page."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from tensortier.server.loading import Loaded

if TYPE_CHECKING:
    from tensortier.types import TierStats

WINDOW_SECONDS = 2.0  # that rates are taken over
_REUSE_SECONDS = 0.2  # several pages that ask at once are told the same


class Live:
    """Rates out of counters that only grow. One for all pages."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, int, int, int]]] = {}  # engine -> time, uses, hits, bytes
        self._told: list[dict[str, Any]] = []
        self._told_at = float("-inf")

    def of(self, loaded: tuple[Loaded, ...]) -> list[dict[str, Any]]:
        """A row for each model that is ready: tokens/s of all its answers together, and where weights stay on the drive
        the hit rate of its experts (0 to 1, None while none is used) and bytes/s read, over the last seconds."""
        now = time.monotonic()
        if now - self._told_at < _REUSE_SECONDS:
            return self._told
        rows = []
        engines = [(one, one.engine) for one in loaded if one.engine is not None and one.phase == "ready"]
        for one, engine in engines:
            activity = engine.activity()
            row: dict[str, Any] = {
                "model": one.name,
                "active": activity.active,
                "waiting": activity.waiting,
                "tokens_per_second": round(activity.decode_tokens_per_second, 2),
                "tokens": activity.completion_tokens_total,
                "context_used": activity.kv_used_cells,
                "context": activity.n_ctx,
                "drive": None,
            }
            if engine.paged is not None:
                row["drive"] = self._drive(id(engine), now, engine.paged.stats())
            rows.append(row)
        alive = {id(engine) for _, engine in engines}
        self._seen = {key: seen for key, seen in self._seen.items() if key in alive}
        self._told, self._told_at = rows, now
        return rows

    def _drive(self, key: int, now: float, stats: TierStats) -> dict[str, Any]:
        uses = sum(layer.uses for layer in stats.layers) + stats.dense_uses
        hits = sum(layer.hits for layer in stats.layers) + stats.dense_hits
        seen = self._seen.setdefault(key, deque([(now, uses, hits, stats.drive_bytes)]))
        seen.append((now, uses, hits, stats.drive_bytes))
        while len(seen) > 2 and now - seen[1][0] > WINDOW_SECONDS:
            seen.popleft()
        then = seen[0]
        used, passed = uses - then[1], now - then[0]
        return {
            "hit_rate": round((hits - then[2]) / used, 4) if used else None,
            "hit_rate_ever": round(hits / uses, 4) if uses else None,
            "bytes_per_second": round((stats.drive_bytes - then[3]) / passed) if passed else 0,
            "bytes": stats.drive_bytes,
            "memory_bytes": stats.memory_bytes,
        }
