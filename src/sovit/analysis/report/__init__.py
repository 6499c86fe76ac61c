"""A fit as something to read: one document, written as HTML, Markdown, JSON and terminal text."""
