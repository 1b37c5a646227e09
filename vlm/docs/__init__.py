"""The documentation: `pages` in Markdown, `examples` that they show and a test runs, and what Sphinx makes of them."""
