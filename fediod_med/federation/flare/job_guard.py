"""The first thing that a job meets at a hospital, named in its own `local/resources.json`; it writes the audit log."""

from __future__ import annotations

from pathlib import Path

from nvflare.apis.app_validation import AppValidator

from fediod_med.federation.flare.audit import AUDIT_FILE, AuditLog
from fediod_med.federation.flare.job_form import check_app


class JobGuard(AppValidator):
    """Refuses any job whose files are not exactly the one configuration that this package writes."""

    def validate(self, app_folder: str) -> tuple[str, dict[str, object]]:
        """The reason to refuse, or an empty text; called at the hospital before the job is deployed."""
        folder = Path(app_folder)
        audit = AuditLog(folder.resolve().parents[1] / AUDIT_FILE)  # KIT/JOB/app
        try:
            check_app(folder)
        except Exception as error:  # a check that fails is a refusal, and its text stays here
            audit.write("refused job", job=folder.resolve().parent.name, reason=f"{type(error).__name__}: {error}")
            return f"refused by this site: {type(error).__name__}", {}
        audit.write("accepted job", job=folder.resolve().parent.name)
        return "", {}
