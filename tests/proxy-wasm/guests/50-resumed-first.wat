(on request_headers (call $say @resume@ (call $continue_stream #0)) #1)
