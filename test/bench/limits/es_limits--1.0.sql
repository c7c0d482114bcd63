CREATE FUNCTION es_limit_nothing_handler(internal) RETURNS table_am_handler
	AS 'MODULE_PATHNAME' LANGUAGE C STRICT;
CREATE FUNCTION es_limit_log_handler(internal) RETURNS table_am_handler
	AS 'MODULE_PATHNAME' LANGUAGE C STRICT;

CREATE ACCESS METHOD es_limit_nothing TYPE TABLE HANDLER es_limit_nothing_handler;
COMMENT ON ACCESS METHOD es_limit_nothing IS 'test-only: takes rows and stores nothing';

CREATE ACCESS METHOD es_limit_log TYPE TABLE HANDLER es_limit_log_handler;
COMMENT ON ACCESS METHOD es_limit_log IS 'test-only: logs each row to WAL as a logical message, and stores nothing';
