"""The studio: a page on this machine on which a person steers single prompts and watches."""
