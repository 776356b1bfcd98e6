(on configure (drop (call $set_tick_period_milliseconds #200)) #1)
(on tick
  (drop (call $set_tick_period_milliseconds #0))
  (call $say @call@ (call $fetch @auth@ %:method=GET;:path=/from-tick;:authority=auth%)))
(on http_call_response (call $show @answer@ (call $get_buffer_bytes #4 #0 #100 OUT)))
