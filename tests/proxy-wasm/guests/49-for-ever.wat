(on request_headers (call $log @held@) #1)
(on log (call $log @log@))
(on done (call $log @done@) #1)
(on delete (call $log @delete@))
