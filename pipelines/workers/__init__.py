"""What runs inside Ray's processes: each builds what it needs from URLs and settings, then calls components.

One module a stage, so that a process imports no more than its work needs.
"""
