"""The last thing that a reply passes at a hospital, named in its own `local/privacy.json`; it writes the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.filter import ContentBlockedException, Filter
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply

from fediod_med.errors import ProtocolError
from fediod_med.federation.flare.audit import AUDIT_FILE, AuditLog
from fediod_med.federation.flare.egress import (
    REASONS,
    check_account,
    check_envelope,
    check_payload,
    read_rules,
)
from fediod_med.federation.flare.names import CONTENT


class EgressGuard(Filter):
    """Lets out exactly the declared fields of a reply; anything else stays, with its reason in the audit log.

    Args:
        fields: rules by kind and field, see `egress.read_rules`.
        floor_mode: the weakest privacy mode that may leave.
    """

    def __init__(self, fields: Mapping[str, Any], floor_mode: str = "none") -> None:
        super().__init__()
        self._rules = read_rules(fields, "privacy.json")
        self._floor_mode = floor_mode

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """A fresh message with what was checked, and nothing else.

        Raises:
            ContentBlockedException: the engine then tells the centre that a filter refused, and no more.
        """
        audit = AuditLog(Path(fl_ctx.get_engine().get_workspace().root_dir) / AUDIT_FILE)
        try:
            return self._checked(shareable, fl_ctx.get_identity_name(), audit)
        except Exception as error:  # a check that fails is a refusal
            audit.write("refused", stage="egress", reason=f"{type(error).__name__}: {error}")
            raise ContentBlockedException("refused by this site's egress rules") from error

    def _checked(self, shareable: Shareable, site: str, audit: AuditLog) -> Shareable:
        undeclared = set(shareable) - {CONTENT, ReservedHeaderKey.HEADERS}
        headers = dict(shareable.get(ReservedHeaderKey.HEADERS) or {})
        code = headers.pop(ReservedKey.RC, ReturnCode.OK)
        if undeclared or headers:
            raise ProtocolError(f"reply: undeclared entries {sorted([*undeclared, *headers])}")
        if CONTENT not in shareable:
            if code not in vars(ReturnCode).values() or code == ReturnCode.OK:
                raise ProtocolError("reply: expected a content or an error of the engine, found neither")
            return make_reply(code)
        content = shareable[CONTENT]
        if code != ReturnCode.OK or not isinstance(content, dict):
            raise ProtocolError(f"reply: expected no content beside error {code}")
        allowed = Shareable()
        allowed[CONTENT] = dict(content)
        if set(content) == {"refused"}:
            if content["refused"] not in REASONS:
                raise ProtocolError("reply: expected a known reason of refusal, found another text")
        elif set(content) == {"account"}:
            check_account(content["account"])
            audit.write("sent", kind="account")
        else:
            check_envelope(content, floor_mode=self._floor_mode)
            found = check_payload(content["payload"], self._rules, site=site)
            audit.write("sent", kind=found.kind, round=found.round, bytes=found.size, mode=content["mode"])
        return allowed
