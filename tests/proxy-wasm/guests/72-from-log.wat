(on log (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/from-log;:authority=auth%)))
(on http_call_response (call $show @answer@ (call $get_buffer_bytes #4 #0 #100 OUT)))
