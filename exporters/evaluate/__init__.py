"""What a version is worth, in numbers: the engine reads or answers a file of data, and metrics come out.

    version folder ──► checked ──► engine (python -m triton_backend) ──► a suite's metrics
    data file      ──► streamed, line by line ──┘

``python -m exporters.evaluate VERSION --suite NAME --data FILE`` is the program. A suite is one file here and one row
of ``suites.SUITES``.
"""
