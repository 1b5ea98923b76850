"""Nobody may import this: tests name it where a file must not decide what is imported."""

raise SystemError("imported")
