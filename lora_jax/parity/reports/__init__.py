"""What a run of the suite found, as JSON, Markdown, charts and one page of HTML."""
