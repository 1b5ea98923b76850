"""What configs say, without torch: names, fields, schemas, validation, group rules, files."""
