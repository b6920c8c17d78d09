"""A job's process at a hospital: takes tasks from the engine to the desk, and names refusals without their text."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fediod_med.errors import FediodError, ProtocolError
from fediod_med.federation.flare.audit import AUDIT_FILE, AuditLog
from fediod_med.federation.flare.desk import Desk, refusal
from fediod_med.federation.flare.leftovers import Leftovers
from fediod_med.federation.flare.names import ACCOUNT_TASK, CONTENT, QUERY_TASK
from fediod_med.federation.flare.plan import hospital_plan
from fediod_med.privacy.records import Head

logger = logging.getLogger(__name__)


class HospitalExecutor(Executor):
    """Answers `fediod_query` and `fediod_account`; takes no argument, so a job can name nothing of the hospital's."""

    def __init__(self) -> None:
        super().__init__()
        self._desk: Desk | None = None
        self._leftovers = Leftovers()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer one task; what leaves is checked once more by the hospital's `guard.EgressGuard`."""
        if task_name not in (QUERY_TASK, ACCOUNT_TASK):
            return make_reply(ReturnCode.TASK_UNKNOWN)
        kit = Path(fl_ctx.get_engine().get_workspace().root_dir).resolve()
        reply = Shareable()
        try:
            reply[CONTENT] = self._answer(task_name, shareable.get(CONTENT), kit, fl_ctx.get_identity_name())
        except Exception as error:  # nothing but a known name may leave, whatever went wrong
            if not isinstance(error, FediodError):
                logger.exception("%s failed", task_name)
            AuditLog(kit / AUDIT_FILE).write("refused", task=task_name, reason=f"{type(error).__name__}: {error}")
            reply[CONTENT] = {"refused": refusal(error)}
        return reply

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Once a reply has left, nobody waits."""
        if event_type == EventType.AFTER_SEND_TASK_RESULT:
            self._leftovers.sweep()

    def _answer(self, task_name: str, content: object, kit: Path, name: str) -> dict[str, object]:
        if self._desk is None:
            self._desk = Desk(hospital_plan(kit), name=name)
        if task_name == ACCOUNT_TASK:
            return {"account": self._desk.account()}
        if not isinstance(content, dict) or set(content) != {"message", "sequence", "hash"}:
            raise ProtocolError("task: expected a message and the ledger head that the centre has seen")
        message, sequence, digest = content["message"], content["sequence"], content["hash"]
        if not isinstance(message, bytes):
            raise ProtocolError(f"task: expected a packed query, found {type(message).__name__}")
        seen = Head(sequence, digest) if isinstance(sequence, int) and isinstance(digest, str) else None
        return asdict(self._desk.answer(message, seen=seen))
