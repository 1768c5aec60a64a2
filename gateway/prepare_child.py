"""What a child process does to one mail: from its octets to the finished document, or to the refusal.

In charge of a job's way through `message` and `document`, from one file into another. The pool runs it as
`python -I -m gateway.prepare_child`.

Promises: only files that the daemon made are written, and nothing that a library prints gets among the
answers.

Fails: as `child.serve` says; what is wrong with a mail is an answer, not a fault.
"""

import base64
import os
import sys
from pathlib import Path

from gateway import document, message
from gateway.child import Json, serve
from gateway.message import MailRefused


def work(job: Json) -> Json:
    """Do one job in the child.

    The job is {"do": "mail" or "picture", "path": file to read, "out": file to fill, and limits}. Answers
    {"ok": fields of Prepared, without the path} or {"refused": fields of MailRefused}.
    """
    source, result = Path(job["path"]), Path(job["out"])
    if job["do"] == "picture":
        _fill(result, document.first_page_picture(source.read_bytes()))
        return {"ok": {}}
    try:
        mail = message.parse(source.read_bytes())
        made = document.join(mail.attachments, max_pages=job["max_pages"], max_size=job["max_size"])
    except MailRefused as refusal:
        fields = {"code": refusal.code, "status": refusal.status, "text": refusal.text, "log": refusal.log}
        return {"refused": fields}
    _fill(result, made.data)
    return {
        "ok": {
            "message_id": mail.message_id,
            "message_key": mail.message_key,
            "subject": mail.subject,
            "references": mail.references,
            "original_headers": base64.b64encode(mail.original_headers).decode("ascii"),
            "digest": mail.digest,
            "pages": made.pages,
            "size": len(made.data),
            "sha256": made.sha256,
        }
    }


def _fill(path: Path, data: bytes) -> None:
    """Write into a file that must exist: once the daemon has removed it, nobody waits for it any more."""
    with path.open("r+b") as file:
        file.write(data)


def main() -> None:
    """Serve jobs from standard input; answers leave by a copy of standard output that no library knows of."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    serve(work, sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
