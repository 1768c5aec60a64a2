"""Email-to-fax gateway: mail a PDF to a telephone number, get a fax and an answer.

The reading map, in the order a fax travels. Imports run downwards only, which tests/test_imports.py holds.

The command line and the daemon's life
    cli, cli_queue    the commands of `fax-gateway`
    demo              the whole way on one machine, shown
    daemon            open, wire, listen, ready, drain, close
    wiring            from the settings to the parts' values
    sandbox*          the stand-in carrier, an HTTP server in Telnyx's shape

Doors and loops; they never import each other
    smtp              mail in: sender, numbers, document, 250
    smtp_session      one SMTP conversation, with limits
    dispatch          what is due: calls, questions to the carrier, time
    web               HTTP in: the carrier's events, health, metrics
    notify            mail out: from the outbox to the relay

What they use
    address           recipient to E.164; may this sender dial this number
    smtp_data         the octets of a mail, from the network into a file, up to its end
    prepare           a mail's way to the finished document: prepare_child (what a child process does)
    store             the verbs over what is stored: store_intake (mail in), store_work (what is due),
                      store_events (the carrier's), store_apply (the one door through which a fax changes),
                      store_brakes (what stops the queue), store_outbox (mail out), store_desk (operators),
                      store_restore (after a backup), store_unit (what they share)
    telnyx            the carrier's HTTP: telnyx_answers, telnyx_events
    relay             the mail server that replies go to
    compose           a reply, from the fax: compose_text

What those use
    message           MIME to attachments, or the refusal: message_bodies (large ones go past the parser)
    document          check, repair and join PDFs; the picture of page 1
    children          the pool of child processes; child: one of them
    carrier           what any carrier does, and its ways to fail
    sqlite, postgresql  the two kinds of database; sqlite_statements: each of its statements compiled once
    database          the threads that do the work; schema and migrations

The ground
    fax               what becomes of a fax: the one place that decides; fax_wishes (operators),
                      fax_steps (what the decisions share)
    schedule, doubt   when it is due next; whether the carrier took it
    records           what a fax is, and everything that can happen to it
    reasons           the failure reasons: class, retry plan, sentence
    clocks            how much time has truly passed
    config, log, metrics, bell, systemd
"""

__version__ = "0.1.0"
