(on request_headers (call $log @headers@) #0)
(on request_body (if (local.get $eos) (then (call $log @end@) (return #0))) #1)
(on response_headers (call $show @status@ (call $get_header_map_value #2 @:status@ OUT)) #0)
(on log (call $log @log@))
