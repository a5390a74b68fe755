"""De-identification: personal data is found in Korean and English text, and masked, tagged, or replaced by pseudonyms (docs/curate_privacy.md)."""
